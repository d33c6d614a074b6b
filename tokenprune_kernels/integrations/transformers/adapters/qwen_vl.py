"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose mixture-of-experts form differs in its MLPs alone.

Qwen2.5-VL has windows in its tower; Qwen3-VL has a timestamp in front of every frame, and DeepStack features.
"""

from .frames import RECEIVED, WINDOWED, merged_family

FAMILIES = (
    merged_family("Qwen2-VL", ("qwen2_vl",), saliency=RECEIVED),
    merged_family("Qwen2.5-VL", ("qwen2_5_vl",), saliency=WINDOWED),
    merged_family("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), saliency=RECEIVED, deepstack=True),
)
