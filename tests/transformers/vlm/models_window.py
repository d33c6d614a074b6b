"""Small random models with windows in their decoders, or prompts whose tokens see each other.

Every window is shorter than the prompts, and than the stretch of visual tokens in them.
"""

import inspect
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


def gemma4(
    images: Images = FLAT, *, attention: str = "sdpa", shared: bool = False, videos: Images | None = None
) -> Prompts:
    """2 x 2 patches averaged to a token. Full layers have heads of another size, whose values are their keys.

    shared: as the small models. Tokens of an image see each other in layers with windows alone, or not at all; there
    are inputs for each layer, and the last two reuse the keys and values of those before. videos: the frames of one
    behind the images of each sample, with text between them.
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
    return _of_gemma4(model, VISION["patch_size"], images, videos)


def _of_gemma4(model: Any, side: int, images: Images, videos: Images | None = None) -> Prompts:
    """Prompts with a token for each 8 x 8 pixels, in patches of side x side pixels."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for b, sample in enumerate(images):
        ids = text(3, draw)
        for kind, sizes in ((IMAGE, sample), (VIDEO, videos[b] if videos else [])):
            for i, (height, width) in enumerate(sizes):
                ids += [*[kind] * (height * width // 64), *text(2 + i, draw)]
        samples.append(ids + text(4 + 2 * b, draw))
    inputs = left_padded(samples)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
    sizes = [size for sample in images for size in sample]
    inputs["pixel_values"], inputs["image_position_ids"] = _patches(sizes, side, draw)
    if videos:
        frames = [size for sample in videos for size in sample]
        inputs["pixel_values_videos"], inputs["video_position_ids"] = _patches(frames, side, draw)
        inputs["num_frames_per_video"] = torch.tensor([len(sample) for sample in videos])
    return Prompts(model, inputs, (IMAGE, VIDEO) if videos else IMAGE, special=(VIDEO, 103))


def _patches(sizes: Sequence[tuple[int, int]], side: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The pixels of the patches of images, and their columns and rows, -1 behind the last."""
    most = max(height * width // side**2 for height, width in sizes)
    places = []
    for height, width in sizes:
        x, y = torch.meshgrid(torch.arange(width // side), torch.arange(height // side), indexing="xy")
        patches = torch.stack([x.flatten(), y.flatten()], 1)
        places.append(torch.nn.functional.pad(patches, (0, 0, 0, most - len(patches)), value=-1))
    return torch.rand(len(places), most, 3 * side**2, generator=draw), torch.stack(places)


def gemma4_shared(images: Images = FLAT, *, attention: str = "sdpa") -> Prompts:
    return gemma4(images, attention=attention, shared=True)


# Two frames behind an image, and three of another size behind another.
BEFORE_VIDEO: Images = [[(16, 24)], [(16, 16)]]
FRAMES: Images = [[(16, 32)] * 2, [(24, 16)] * 3]


def _takes_videos(kind: type) -> bool:
    """Of several lengths; older versions take them all of one."""
    return "num_frames_per_video" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def gemma4_video() -> Prompts:
    from transformers import Gemma4ForConditionalGeneration

    if not _takes_videos(Gemma4ForConditionalGeneration):
        raise ImportError("whose Gemma 4 takes videos of one length")
    return gemma4(BEFORE_VIDEO, videos=FRAMES)


def gemma4_unified() -> Prompts:
    """The Gemma 4 without a tower: pixels are projected to tokens."""
    from transformers import (
        Gemma4UnifiedConfig,
        Gemma4UnifiedForConditionalGeneration,
        Gemma4UnifiedTextConfig,
        Gemma4UnifiedVisionConfig,
    )

    width = TEXT["hidden_size"]
    config = Gemma4UnifiedConfig(
        vision_config=Gemma4UnifiedVisionConfig(
            patch_size=4, pooling_kernel_size=2, mm_embed_dim=width, mm_posemb_size=16, output_proj_dims=width
        ),
        text_config=Gemma4UnifiedTextConfig(**TEXT, layer_types=BOTH, head_dim=16, sliding_window=WINDOW),
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=103, boi_token_id=104, eoi_token_id=105,
        boa_token_id=106, eoa_token_index=107,
    )  # fmt: skip
    model = random_model(Gemma4UnifiedForConditionalGeneration, config, "sdpa")
    if not _takes_videos(type(model)):
        return _of_gemma4(model, 8, FLAT)
    return _of_gemma4(model, 8, BEFORE_VIDEO, FRAMES)


def cohere2_vision(tiles: Sequence[int] = (1, 2), *, attention: str = "sdpa", aya: bool = False) -> Prompts:
    """10 x 10 patches of a tile make 5 x 5 tokens, side by side; layers with windows rotate, the others do not."""
    import transformers as tf

    ids = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1}
    language = tf.Cohere2Config(**TEXT, **ids, sliding_window=WINDOW, layer_types=BOTH)
    name, more = ("AyaVision", {"image_token_index": IMAGE}) if aya else ("Cohere2Vision", {"image_token_id": IMAGE})
    config = getattr(tf, f"{name}Config")(
        vision_config=_siglip(10), text_config=language, alignment_intermediate_size=48, **more
    )
    model = random_model(getattr(tf, f"{name}ForConditionalGeneration"), config, attention)
    inputs, pixels = _squares(tiles, 10, 25)
    return Prompts(model, {**inputs, "pixel_values": pixels}, IMAGE)


def aya_vision(tiles: Sequence[int] = (1, 2), *, attention: str = "sdpa") -> Prompts:
    return cohere2_vision(tiles, attention=attention, aya=True)


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
    "gemma4": gemma4, "gemma4_shared": gemma4_shared, "aya_vision": aya_vision,
    "llama4": llama4,
}  # fmt: skip
