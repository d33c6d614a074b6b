"""What the three attention ops share of their descriptions."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .._checks import Sizes, complain, fail, shape_text
from .._op import Choice, Rule, along, flags, floats, indices, integers

ATTENTION: dict[str, Any] = {
    "query": floats("B Hq M D"),
    "key": floats("B Hkv N D", like="query"),
    "key_mask": flags("B N"),
    "query_positions": integers("B M"),
}
REDUCED: dict[str, Any] = {
    "key_indices": indices("B V"),
    "query_mask": flags("B M"),
    "head_reduction": Choice(("mean", "sum", "max", "none")),
    "query_reduction": Choice(("mean", "sum", "max", "last"), joined=True, alone="none"),
}


def reduced_shape(
    sizes: Sizes, *, key_indices: Tensor | None, head_reduction: str, query_reduction: str, **_: Any
) -> list[int]:
    """[B, R, V] of R row reductions and the V columns asked for; kept heads and rows between them, [B, R, Hq, M, V]."""
    per_head = [sizes["Hq"]] if head_reduction == "none" else []
    per_row = [sizes["M"]] if query_reduction == "none" else []
    return [sizes["B"], query_reduction.count("+") + 1, *per_head, *per_row, sizes["N" if key_indices is None else "V"]]


# The most heads that a model has; beyond FEW they come by fours, where lengths come as they like.
MOST_HEADS, FEW_HEADS = 128, 16
LOOKS_SWAPPED = 'key looks like [B, N, Hkv, D]: pass layout="blhd", or key.transpose(1, 2)'


def looks_swapped(heads: Any, tokens: Any) -> bool:
    """More heads than tokens, and a number of heads that no model has: [B, L, H, D] read as [B, H, L, D].

    csrc/args/attention.h has the same. What is symbolic passes: comparing would leave a guard."""
    if type(heads) is not int or type(tokens) is not int:
        return False
    return heads > tokens and (heads > MOST_HEADS or (heads > FEW_HEADS and heads % 4 != 0))


def heads_first(who: str, layout: str, **tensors: Tensor) -> list[Tensor]:
    """The tensors as [B, H, L, D]: views where `layout` says that they are [B, L, H, D]."""
    if layout == "bhld":
        return list(tensors.values())
    if layout != "blhd":
        got = f"'{layout}'" if isinstance(layout, str) else type(layout).__name__
        complain(ValueError, who, "layout", "be one of bhld, blhd", got)
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            complain(TypeError, who, name, "be a tensor", type(t).__name__)
        if t.dim() != 4:
            complain(ValueError, who, name, 'have shape [B, L, H, D], as layout="blhd" says', shape_text(t))
    return [t.transpose(1, 2) for t in tensors.values()]


def _check_heads(op: str, sizes: Sizes, query: Tensor, *_: Any) -> None:
    if sizes["D"] < 1:
        fail(ValueError, op, "query", "have a last dimension D >= 1", shape_text(query))
    heads, key_heads = sizes["Hq"], sizes["Hkv"]
    swapped = looks_swapped(key_heads, sizes["N"])
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        expected = f"have a number of heads that is a multiple of Hkv = {key_heads}"
        fail(ValueError, op, "query", expected, heads, LOOKS_SWAPPED if swapped else "")
    if swapped and not torch.compiler.is_compiling():
        warnings.warn(
            f"tokenprune::{op}: {LOOKS_SWAPPED} (it has more heads than tokens, {key_heads} and {sizes['N']}, and no "
            f"model has more than {MOST_HEADS} heads, or more than {FEW_HEADS} that are no multiple of 4)",
            stacklevel=6,
        )


# Where the key has more heads than tokens, the description is gone through, and may warn.
HEADS = Rule(_check_heads, cpp="check_heads(op, query, key)", expression="Hq % Hkv == 0 and Hkv <= N")

# Heads are reduced before rows, so that a sum over heads commutes with sums over rows, and not with their maximum.
_LINEAR = ("mean", "sum", "last", "none")
BY_HEADS = (
    along("Hq Hkv", head_reduction=("none",)),
    along("Hq Hkv", partial="sum", head_reduction=("sum",), query_reduction=_LINEAR),
    along("Hq Hkv", partial="avg", head_reduction=("mean",), query_reduction=_LINEAR),
)
# A causal row's position follows from how many rows there are.
BY_ROWS = along("M", causal=(False,), query_reduction=("none",))
