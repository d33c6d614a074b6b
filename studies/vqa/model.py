"""The model: a CLIP vision tower, a two-layer projector and a Llama decoder, four layers each of width 128."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .scene import PATCH
from .words import BOS, EOS, IMAGE, PAD, VOCABULARY, tokenizer

SIDE = 24  # visual tokens along a side of the image
WIDTH = 128
HEADS = 4
LAYERS = 4
# An image, then the question: nothing marks whose turn it is, because there is one turn.
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endfor %}"
)
MEAN, DEVIATION = 0.45, 0.25  # of the pixels, for all three channels


def config() -> LlavaConfig:
    """Features are the last layer's, so that no layer of the tower is idle; word embeddings are also the output's."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=SIDE * PATCH, patch_size=PATCH, projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, vocab_size=len(VOCABULARY), max_position_embeddings=1024,
            tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        ),
        image_token_index=IMAGE, image_seq_length=SIDE * SIDE, vision_feature_layer=-1, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip


def build(seed: int = 0) -> LlavaForConditionalGeneration:
    """The model before training."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    # Word embeddings of length 1: they are what the visual tokens are compared with.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=WIDTH**-0.5)
    tower = model.model.vision_tower
    with torch.no_grad():
        getattr(tower, "vision_model", tower).embeddings.position_embedding.weight[1:] = waves()
    return model


def waves() -> Tensor:
    """[576, C]: where the position embeddings begin: waves of 3 to 48 tokens along both axes.

    Then "the token to the left" is one linear map everywhere, and need not be learned for each coordinate anew.
    """
    length = 3.0 * 16.0 ** torch.linspace(0, 1, WIDTH // 4)
    phase = torch.arange(SIDE)[:, None] * (2 * torch.pi / length)
    axis = torch.cat([phase.sin(), phase.cos()], 1) / 2  # [24, C / 2]
    rows, columns = axis[:, None].expand(-1, SIDE, -1), axis[None].expand(SIDE, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def processor() -> LlavaProcessor:
    """Images are resized to 336 x 336; `"<image> which digit is tiny?"` becomes <s>, 576 times <image>, the words."""
    side = SIDE * PATCH
    images = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    )
    return LlavaProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights (float16), configuration, tokenizer and image processor, as `from_pretrained` reads them."""
    model.half().save_pretrained(folder)
    model.float()
    processor().save_pretrained(folder)
