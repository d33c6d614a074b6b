"""Qwen3.5: images and frames as in Qwen3-VL, in front of a decoder most of whose layers have linear attention.

Caches of older versions of transformers hold no states of such layers; there full attention is all that is served.
"""

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

from .frames import RECEIVED, merged_family

_STATES: list[type] = [cache_utils.LinearAttentionLayer] if hasattr(cache_utils, "LinearAttentionLayer") else []

FAMILIES = (
    merged_family(
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_moe"),
        saliency=RECEIVED,
        layer_types=frozenset({"full_attention", *(["linear_attention"] if _STATES else [])}),
        cache_layers=(DynamicLayer, *_STATES),
    ),
)
