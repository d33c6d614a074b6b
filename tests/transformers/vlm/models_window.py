"""Small random models with windows in their decoders, or prompts whose tokens see each other.

Every window is shorter than the prompts, and than the stretch of visual tokens in them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .models import IMAGE, PAD, TEXT, Prompts, left_padded, text
from .models_crops import VIDEO, Images, random_model
from .models_towers import IMAGE_END, ROW_END, VISION

WINDOW = 12
# In front of the usual pruning layer and behind it there is one of each kind.
BOTH = ["sliding_attention", "full_attention"] * 2
# Of 9 x 11 patches a row and a column have no partner to be merged with.
SIZES: Images = [[(36, 44)], [(32, 16), (24, 24)]]
FLAT: Images = [[(32, 40)], [(16, 24), (24, 32)]]


def mistral3(images: Images = SIZES, *, attention: str = "sdpa", window: int | None = WINDOW) -> Prompts:
    """A window in all layers; Pixtral with a patch merger, a token behind each row."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=64),
        text_config=MistralConfig(**TEXT, sliding_window=window),
        image_token_index=IMAGE,
    )
    model = random_model(Mistral3ForConditionalGeneration, config, attention)
    draw = torch.Generator().manual_seed(3)
    sizes = torch.tensor([size for sample in images for size in sample])
    pixels = torch.zeros(len(sizes), 3, *sizes.amax(0).tolist())
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=draw)
    samples = []
    for b, sample in enumerate(images):
        ids = text(3, draw)
        for i, (height, width) in enumerate(sample):
            rows, columns = height // 8, width // 8
            ids += [*([*[IMAGE] * columns, ROW_END] * rows)[:-1], IMAGE_END, *text(2 + i, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    return Prompts(model, {**left_padded(samples), "pixel_values": pixels, "image_sizes": sizes}, IMAGE)


def _siglip(side: int) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION, image_size=4 * side, vision_use_head=False, projection_dim=TEXT["hidden_size"])


def _squares(counts: Sequence[int], side: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """So many images of `tokens` tokens and `side` patches a side in each sample: its ids and their pixels."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for b, count in enumerate(counts):
        ids = text(3, draw)
        for i in range(count):
            ids += [*[IMAGE] * tokens, *text(2 + i, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    return left_padded(samples), torch.randn(sum(counts), 3, 4 * side, 4 * side, generator=draw)


def paligemma(counts: Sequence[int] = (1, 2), *, attention: str = "sdpa", windows: bool = False) -> Prompts:
    """A prompt sees all of itself. windows: PaliGemma 2, whose decoder is Gemma 2."""
    from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    ids = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 16}
    language = GemmaConfig(**TEXT, **ids)
    if windows:
        more = {"sliding_window": WINDOW, "layer_types": BOTH, "query_pre_attn_scalar": 16}
        language = Gemma2Config(**TEXT, **ids, **more, attn_logit_softcapping=2.0)
    config = PaliGemmaConfig(
        vision_config=_siglip(5), text_config=language, image_token_index=IMAGE, projection_dim=TEXT["hidden_size"]
    )
    model = random_model(PaliGemmaForConditionalGeneration, config, attention)
    inputs, pixels = _squares(counts, 5, 25)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return Prompts(model, {**inputs, "pixel_values": pixels}, IMAGE, new_type=1)


def paligemma2(counts: Sequence[int] = (1, 2), *, attention: str = "eager") -> Prompts:
    """Gemma 2 has a soft cap, which sdpa would leave out."""
    return paligemma(counts, attention=attention, windows=True)


def gemma3(counts: Sequence[int] = (1, 2), *, attention: str = "sdpa") -> Prompts:
    """10 x 10 patches averaged to 5 x 5 tokens, which see each other; each kind of layer has a rotation of its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    language = Gemma3TextConfig(
        **TEXT, head_dim=16, sliding_window=WINDOW, layer_types=BOTH, query_pre_attn_scalar=16,
        pad_token_id=PAD, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=_siglip(10), text_config=language, mm_tokens_per_image=25, image_token_index=IMAGE
    )
    model = random_model(Gemma3ForConditionalGeneration, config, attention)
    inputs, pixels = _squares(counts, 10, 25)
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Prompts(model, {**inputs, "pixel_values": pixels}, IMAGE)


def gemma4(images: Images = FLAT, *, attention: str = "sdpa", shared: bool = False) -> Prompts:
    """2 x 2 patches averaged to a token. Full layers have heads of another size, whose values are their keys.

    shared: as the small models. Tokens of an image see each other in layers with windows alone, or not at all; there
    are inputs for each layer, and the last two reuse the keys and values of those before.
    """
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

    vision = Gemma4VisionConfig(
        **VISION, num_key_value_heads=4, head_dim=8, pooling_kernel_size=2, position_embedding_size=16
    )
    more: dict[str, Any] = {
        "layer_types": list(BOTH), "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    }  # fmt: skip
    if shared:
        more = {
            "num_hidden_layers": 6, "layer_types": [*BOTH, *BOTH[:2]], "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TEXT["vocab_size"],
        }  # fmt: skip
    language = Gemma4TextConfig(**{**TEXT, **more}, head_dim=16, global_head_dim=32, sliding_window=WINDOW)
    config = Gemma4Config(
        vision_config=vision, text_config=language, image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=103,
        boi_token_id=104, eoi_token_id=105, boa_token_id=106, eoa_token_index=107,
    )  # fmt: skip
    model = random_model(Gemma4ForConditionalGeneration, config, attention)
    draw = torch.Generator().manual_seed(3)
    grids = [[(height // 4, width // 4) for height, width in sample] for sample in images]
    most = max(rows * columns for sample in grids for rows, columns in sample)
    places, samples = [], []
    for b, sample in enumerate(grids):
        ids = text(3, draw)
        for i, (rows, columns) in enumerate(sample):
            x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
            patches = torch.stack([x.flatten(), y.flatten()], 1)
            places.append(torch.nn.functional.pad(patches, (0, 0, 0, most - len(patches)), value=-1))
            ids += [*[IMAGE] * (rows * columns // 4), *text(2 + i, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    inputs = left_padded(samples)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["image_position_ids"] = torch.stack(places)
    inputs["pixel_values"] = torch.rand(len(places), most, 3 * VISION["patch_size"] ** 2, generator=draw)
    return Prompts(model, inputs, IMAGE, special=(VIDEO, 103))


def gemma4_shared(images: Images = FLAT, *, attention: str = "sdpa") -> Prompts:
    return gemma4(images, attention=attention, shared=True)


def llama4(tiles: Sequence[int] = (1, 2), *, attention: str = "sdpa") -> Prompts:
    """Chunks of the prompt, and layers without rotation that see all of it; 10 x 10 patches make 5 x 5 tokens."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    vision = Llama4VisionConfig(
        **{**VISION, "intermediate_size": 128}, image_size=40, vision_output_dim=32, projector_input_dim=32,
        projector_output_dim=32,
    )  # fmt: skip
    language = Llama4TextConfig(
        **TEXT, head_dim=16, intermediate_size_mlp=96, num_local_experts=2, interleave_moe_layer_step=2,
        no_rope_layers=[1, 0] * 2, attention_chunk_size=WINDOW, floor_scale=128, pad_token_id=PAD,
    )  # fmt: skip
    # In transformers 5.24.0 the model reads this of its decoder's output, which has none, and fails without it.
    MoeCausalLMOutputWithPast.image_outputs = getattr(MoeCausalLMOutputWithPast, "image_outputs", None)
    config = Llama4Config(vision_config=vision, text_config=language, image_token_index=IMAGE)
    model = random_model(Llama4ForConditionalGeneration, config, attention)
    inputs, pixels = _squares(tiles, 10, 25)
    return Prompts(model, {**inputs, "pixel_values": pixels}, IMAGE)


FAMILIES: dict[str, Callable[..., Prompts]] = {
    "mistral3": mistral3, "paligemma": paligemma, "paligemma2": paligemma2, "gemma3": gemma3,
    "gemma4": gemma4, "gemma4_shared": gemma4_shared,
    "llama4": llama4,
}  # fmt: skip
