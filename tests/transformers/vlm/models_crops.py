"""Small random models whose images come in crops, tiles or frames, and prompts as their processors make them.

An image is its height and width in pixels. Its prompt has as many placeholders as the model's own encoder gives
features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .models import IMAGE, TEXT, Prompts, left_padded, text

VIDEO = 101
# A batch of samples, each a list of images; there is text in front of them, between them and behind them.
Images = Sequence[Sequence[tuple[int, int]]]
SINGLE: Images = [[(20, 44)]]
RAGGED: Images = [[(20, 44)], [(50, 30)]]
SEVERAL: Images = [[(20, 44), (16, 16)], [(30, 18)]]


def random_model(kind: type, config: Any, attention: str) -> Any:
    torch.manual_seed(7)
    model = kind(config).eval()
    # Fresh norms and class tokens are ones and zeros, and attention is nearly uniform: both hide mistakes.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(4)
    model.set_attn_implementation(attention)
    return model


def placeholders(batch: Sequence[Sequence[int]], visual: Sequence[int], draw: torch.Generator) -> dict[str, Tensor]:
    """Samples from the number of placeholders of each image, whose ids are `visual`, in turn."""
    ids = iter(visual)
    samples = []
    for b, images in enumerate(batch):
        sample = text(3, draw)
        for i, count in enumerate(images):
            sample += [next(ids)] * count + text(2 + i, draw)
        samples.append(sample + text(4 + 2 * b, draw))
    return left_padded(samples)


def noise(crops: int, side: int, draw: torch.Generator) -> Tensor:
    return torch.randn(crops, 3, side, side, generator=draw)


def stacked(images: list[Tensor]) -> Tensor:
    """[images, crops, 3, h, w], zeros for the missing crops, as the image processors pad them."""
    most = max(map(len, images))
    return torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in images])


def crops_of(size: tuple[int, int], pinpoints: list[list[int]], side: int) -> int:
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, pinpoints)
    return 1 + height // side * (width // side)


def llava_next(
    images: Images = SINGLE, *, attention: str = "sdpa", vision: Any = None, language: Any = None, **more: Any
) -> Prompts:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    side, pinpoints = 16, [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=side, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision or clip, text_config=language or LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_grid_pinpoints=pinpoints, image_seq_length=16, **more,
    )  # fmt: skip
    model = random_model(LlavaNextForConditionalGeneration, config, attention)
    draw = torch.Generator().manual_seed(3)
    sizes = [size for sample in images for size in sample]
    pixels = stacked([noise(crops_of(size, pinpoints, side), side, draw) for size in sizes])
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        encoded = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    return Prompts(model, {**_grouped(images, encoded, draw), **inputs}, IMAGE)


def _grouped(images: Images, encoded: Sequence[Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    counts = iter(len(features) for features in encoded)
    batch = [[next(counts) for _ in sample] for sample in images]
    return placeholders(batch, [IMAGE] * len(encoded), draw)


def _onevision(attention: str) -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=20, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    pinpoints = [[20 * rows, 20 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return random_model(LlavaOnevisionForConditionalGeneration, config, attention)


def llava_onevision(images: Images = SINGLE, *, attention: str = "sdpa") -> Prompts:
    model = _onevision(attention)
    draw = torch.Generator().manual_seed(3)
    sizes = [size for sample in images for size in sample]
    # A sample with several images has no crops of them.
    crops = [
        crops_of(size, model.config.image_grid_pinpoints, 20) if len(sample) == 1 else 1
        for sample in images
        for size in sample
    ]
    inputs = {
        "pixel_values": stacked([noise(n, 20, draw) for n in crops]),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor([len(sample) for sample in images]),
    }
    with torch.no_grad():
        encoded = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    return Prompts(model, {**_grouped(images, encoded, draw), **inputs}, IMAGE)


def llava_onevision_video(*, attention: str = "sdpa") -> Prompts:
    """Two videos of three frames, and in the second sample an image in front of its video."""
    model = _onevision(attention)
    draw = torch.Generator().manual_seed(3)
    size = (20, 44)
    crops = crops_of(size, model.config.image_grid_pinpoints, 20)
    inputs = {
        "pixel_values": stacked([noise(crops, 20, draw)]),
        "image_sizes": torch.tensor([size]),
        "pixel_values_videos": torch.randn(2, 3, 3, 20, 20, generator=draw),
    }
    with torch.no_grad():
        names = ("pixel_values", "image_sizes")
        image = model.model.get_image_features(**{n: inputs[n] for n in names}, return_dict=True).pooler_output[0]
    video = 3 * 9 + 1
    ids = placeholders([[video], [len(image), video]], [VIDEO, IMAGE, VIDEO], draw)
    return Prompts(model, {**ids, **inputs}, (IMAGE, VIDEO))


def _internvl(attention: str) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=2,
        use_qk_norm=True, attention_bias=True,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(InternVLForConditionalGeneration, config, attention)


def tiled(image: Tensor, rows: int, columns: int, side: int = 16) -> Tensor:
    """[tiles, 3, side, side]: the tiles of an image [3, h, w], and its thumbnail when they are several."""
    resize = torch.nn.functional.interpolate
    whole = resize(image[None], (rows * side, columns * side), mode="bilinear", antialias=True)[0]
    tiles = whole.unflatten(2, (columns, side)).unflatten(1, (rows, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(tiles) == 1:
        return tiles
    return torch.cat([tiles, resize(image[None], (side, side), mode="bilinear", antialias=True)])


def internvl(images: Images = SINGLE, *, attention: str = "sdpa") -> Prompts:
    """The images are as in the other families: tiles of 16 pixels, as many as are nearest to their size."""
    model = _internvl(attention)
    draw = torch.Generator().manual_seed(3)
    tiles, batch = [], []
    for sample in images:
        counts = []
        for height, width in sample:
            smooth = torch.randn(1, 3, 4, 4, generator=draw)
            image = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")[0]
            tiles.append(tiled(image, max(1, round(height / 16)), max(1, round(width / 16))))
            counts.append(len(tiles[-1]) * 16)
        batch.append(counts)
    ids = placeholders(batch, [IMAGE] * len(tiles), draw)
    return Prompts(model, {**ids, "pixel_values": torch.cat(tiles)}, IMAGE)


def qianfan_ocr(images: Images = SINGLE) -> Prompts:
    """An InternVL under another name."""
    import transformers as tf

    if not hasattr(tf, "QianfanOCRConfig"):
        raise ImportError("which has no Qianfan-OCR")
    vision = tf.QianfanOCRVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=2,
    )  # fmt: skip
    config = tf.QianfanOCRConfig(
        vision_config=vision, text_config=tf.Qwen3Config(**TEXT, head_dim=16), image_token_id=IMAGE
    )
    prompts = internvl(images)
    return Prompts(random_model(tf.QianfanOCRForConditionalGeneration, config, "sdpa"), prompts.inputs, IMAGE)


def internvl_video(*, attention: str = "sdpa") -> Prompts:
    """Frames are tiles with text between them; here an image of 2 x 1 tiles in front of them, in the second sample."""
    model = _internvl(attention)
    draw = torch.Generator().manual_seed(3)
    image = tiled(torch.randn(3, 32, 16, generator=draw), 2, 1)
    ids = placeholders([[16] * 3, [48, 16, 16]], [IMAGE] * 6, draw)
    pixels = torch.cat([noise(3, 16, draw), image, noise(2, 16, draw)])
    return Prompts(model, {**ids, "pixel_values": pixels}, IMAGE)
