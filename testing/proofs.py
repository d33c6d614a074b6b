"""What is proven of each family of models: the list that tests/transformers/test_proofs.py runs, and that the table of
docs/transformers.md shows.

A family is proven by batches of prompts for a small random model of its real classes: with every method nothing dropped
changes no bit, and what some dropped gives are the logits of the float64 path that masks dropped tokens instead, in the
prefill and in decoding, and its greedy tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenprune_kernels.methods import get_method, method_names

# In the model, twice, before it with renumbered positions, and before it with the original ones.
FOUR = ("coast", "sts", "adafv", "divprune")
EVERY = method_names()
LONG, SHORT = 32, 5  # tokens that are decoded


@dataclass(frozen=True)
class Proof:
    """A line of the table.

    batches: functions of tests/transformers/vlm that make a model and prompts for it, as "module.function", or
    "module.function:batch" for one that takes a batch: a name, of `runs_crops.BATCHES` or its own. The first is padded
    on the left, and has images of different sizes where the family takes them.
    """

    model_type: str
    batches: tuple[str, ...]
    # What is in the prompts, for the table.
    of: str
    # Methods that decode 32 tokens on the first batch; 5 otherwise.
    long: tuple[str, ...] = FOUR
    # Methods that are refused, with a part of the message.
    refuses: Mapping[str, str] = field(default_factory=dict)
    # The float64 path, a function of tests/transformers/vlm that is called as `oracle.logits`.
    path: str = "oracle.logits"

    def decoded(self, method: str, batch: str) -> int:
        return LONG if method in self.long and batch == self.batches[0] else SHORT


def _sizes(function: str, *more: str) -> tuple[str, ...]:
    return *(f"{function}:{batch}" for batch in ("ragged", "single", "several", "beside text alone")), *more


_CLASS_TOKENS = "needs the position of every visual token on a grid, and the class tokens among them are on none"
# It reads the attention of the layer before and the keys of its own.
_LINEAR = {"adaptprune": "it can choose in front of no layer"}
# Towers whose attention is not called through transformers' registry, and images without one.
_NO_SALIENCY = {name: "has no saliency for" for name in EVERY if "saliency" in get_method(name).uses}

PROOFS = (
    Proof("llava", ("models.llava_padded",), "an image each", EVERY),
    Proof("llava", _sizes("models_towers.pixtral"), "Pixtral: images of any size", EVERY),
    Proof("vipllava", ("models_towers.vipllava",), "an image each"),
    Proof("llava_next", _sizes("models_crops.llava_next"), "images in crops", EVERY),
    Proof("llava_next_video", ("models_video.llava_next_video",), "videos, an image in crops"),
    Proof(
        "llava_onevision", _sizes("models_crops.llava_onevision", "models_crops.llava_onevision_video"),
        "images in crops, videos", EVERY,
    ),
    Proof("video_llava", ("models_video.video_llava_images",), "images"),
    Proof(
        "video_llava", ("models_video.video_llava_videos",), "videos, an image",
        refuses=dict.fromkeys(("sts", "adaptprune", "evs"), _CLASS_TOKENS),
    ),
    Proof("qwen2_vl", ("runs_qwen.batch:qwen2_vl",), "images of any size, a video", EVERY),
    Proof("qwen2_5_vl", ("runs_qwen.batch:qwen2_5_vl",), "images of any size, a video", EVERY),
    Proof("qwen3_vl", ("runs_qwen.batch:qwen3_vl",), "images of any size, a video", EVERY),
    Proof("qwen3_vl_moe", ("models_mrope.batch:qwen3_vl_moe",), "images of any size, videos"),
    Proof(
        "qwen3_5", ("models_hybrid.batch:qwen3_5",), "images of any size, a video", refuses=_LINEAR,
        path="oracle_removing.logits",
    ),
    Proof(
        "qwen3_5_moe", ("models_hybrid.batch:qwen3_5_moe",), "images of any size, a video", refuses=_LINEAR,
        path="oracle_removing.logits",
    ),
    Proof("qwen2_5_omni_thinker", ("models_omni.batch:qwen2_5_omni_thinker",), "images of any size, a video, sound"),
    Proof(
        "qwen3_omni_moe_thinker", ("models_omni.batch:qwen3_omni_moe_thinker",), "images of any size, a video, sound",
    ),
    Proof("glm4v", ("models_mrope.batch:glm4v", "models_mrope.videos:glm4v"), "images of any size, videos"),
    Proof("glm4v_moe", ("models_mrope.batch:glm4v_moe",), "images of any size"),
    Proof("glm46v", ("models_mrope.batch:glm46v",), "images of any size", ("coast",)),
    Proof("glmga", ("models_mrope.batch:glmga",), "images of any size", ("coast",)),
    Proof("glm_ocr", ("models_mrope.batch:glm_ocr",), "images of any size", ("coast",)),
    Proof("internvl", _sizes("models_crops.internvl", "models_crops.internvl_video"), "images in tiles, frames", EVERY),
    Proof("idefics3", ("models_tiles.idefics3", "models_tiles.idefics3_frames"), "images in tiles, frames"),
    Proof("smolvlm", ("models_tiles.smolvlm", "models_tiles.smolvlm_frames"), "images in tiles, frames"),
    Proof("ovis2", ("models_tiles.ovis2",), "images in tiles"),
    Proof("mistral3", ("models_window.mistral3",), "images of any size; windows"),
    Proof("paligemma", ("models_window.paligemma", "models_window.paligemma2"), "images; Gemma 2 with windows"),
    Proof("gemma3", ("models_window.gemma3",), "images; windows"),
    Proof(
        "gemma3n", ("models_timm.gemma3n", "models_timm.gemma3n_shared"), "images; windows, shared keys",
        refuses=_NO_SALIENCY,
    ),
    Proof(
        "gemma4", ("models_window.gemma4", "models_window.gemma4_shared", "models_window.gemma4_video"),
        "images of any size, videos; windows, shared keys",
    ),
    Proof(
        "gemma4_unified", ("models_window.gemma4_unified",), "images of any size, videos; windows", ("coast",),
        refuses=_NO_SALIENCY,
    ),
    Proof("llama4", ("models_window.llama4",), "tiles; chunks"),
    Proof("aya_vision", ("models_window.aya_vision",), "tiles; windows"),
    Proof("cohere2_vision", ("models_window.cohere2_vision",), "tiles; windows", ("coast",)),
    Proof("molmo2", ("models_molmo2.images", "models_molmo2.olmo", "models_molmo2.videos"), "images in views, videos"),
    Proof(
        "lfm2_vl", ("models_merged.lfm2_vl",), "images of any size", refuses=_LINEAR, path="oracle_removing.logits",
    ),
    Proof(
        "minicpmv4_6", ("models_hybrid.minicpmv",), "images and frames of any size", refuses=_LINEAR,
        path="oracle_removing.logits",
    ),
    Proof("paddleocr_vl", ("models_merged.paddleocr_vl",), "images of any size"),
    Proof("video_llama_3", ("models_merged.video_llama_3",), "images and frames of any size", ("coast",)),
    Proof("lighton_ocr", ("models_merged.lighton_ocr",), "images of any size", ("coast",)),
    Proof("qianfan_ocr", ("models_crops.qianfan_ocr:ragged",), "images in tiles", ("coast",)),
    Proof("perception_lm", ("models_timm.perception_lm",), "tiles, frames", ("coast",), refuses=_NO_SALIENCY),
    Proof("got_ocr2", ("models_squares.got_ocr2",), "images", ("coast",), refuses=_NO_SALIENCY),
    Proof("deepseek_vl", ("models_squares.deepseek_vl",), "images", ("coast",)),
    Proof("deepseek_vl_hybrid", ("models_squares.deepseek_vl_hybrid",), "images", ("coast",)),
    Proof("janus", ("models_squares.janus",), "images", ("coast",)),
)  # fmt: skip
