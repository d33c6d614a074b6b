"""Qwen3-VL: as Qwen2-VL, with a timestamp in front of every frame and DeepStack features (deepstack.py)."""

from ..families import Family, register_family
from .llava import core_of, decoder_of
from .qwen2_vl import ReceivedAttention, layout, visual_ids

register_family(
    Family(
        name="Qwen3-VL",
        core=core_of,
        decoder=decoder_of,
        visual_ids=visual_ids,
        layout=layout,
        saliency=ReceivedAttention,
        renumber=False,
    ),
    "qwen3_vl",
)
