"""Qwen3.5: images and frames as in Qwen3-VL, in front of a decoder most of whose layers have linear attention."""

from ..families import with_states
from .frames import RECEIVED, merged_family

FAMILIES = (merged_family("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), saliency=RECEIVED, **with_states("linear_attention")),)
