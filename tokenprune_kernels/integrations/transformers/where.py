"""In front of which decoder layers a stage can choose: where there is the attention that it reads.

Layers with linear attention or a convolution have a state, and no queries and keys that could be compared.
"""

from collections.abc import Sequence
from typing import Any

from ...methods import Stage


def _read(stage: Stage, at: int) -> dict[int, str]:
    """What a choice in front of layer `at` reads of which layer's attention."""
    read = {}
    if stage.reads_attention:
        read[at - 1] = "the attention"
    if stage.projects or "unrotated_key" in stage.uses:
        read[at] = "the projections"
    return read


def _lacking(stage: Stage, layers: Sequence[Any], at: int) -> list[str]:
    return [f"{what} of layer {i}" for i, what in _read(stage, at).items() if not hasattr(layers[i], "self_attn")]


def first_from(stage: Stage, layers: Sequence[Any], at: int) -> int:
    """The first layer from `at` on in front of which the stage can choose; `at` itself if there is none."""
    return next((index for index in range(at, len(layers)) if not _lacking(stage, layers, index)), at)


def check_where(method: str, stage: Stage, layers: Sequence[Any], at: int) -> None:
    """Whether decoder layer `at` and the one before have the attention that the stage reads."""
    lacking = _lacking(stage, layers, at)
    if lacking:
        can = [str(index) for index in range(1, len(layers)) if not _lacking(stage, layers, index)]
        raise NotImplementedError(
            f"prune_visual_tokens: {method} reads {' and '.join(lacking)}, which has a state in its place; in this "
            f"model it can choose in front of {'layer ' + ', '.join(can) if can else 'no layer'}"
        )
