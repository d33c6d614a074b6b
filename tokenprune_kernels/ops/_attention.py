"""What the three attention ops share of their descriptions."""

from typing import Any

from torch import Tensor

from .._checks import Sizes, fail, shape_text
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


def _check_heads(op: str, sizes: Sizes, query: Tensor, *_: Any) -> None:
    if sizes["D"] < 1:
        fail(ValueError, op, "query", "have a last dimension D >= 1", shape_text(query))
    heads, key_heads = sizes["Hq"], sizes["Hkv"]
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        fail(ValueError, op, "query", f"have a number of heads that is a multiple of Hkv = {key_heads}", heads)


HEADS = Rule(_check_heads, cpp="check_heads(op, query, key)", expression="Hq % Hkv == 0")

# Heads are reduced before rows, so that a sum over heads commutes with sums over rows, and not with their maximum.
_LINEAR = ("mean", "sum", "last", "none")
BY_HEADS = (
    along("Hq Hkv", head_reduction=("none",)),
    along("Hq Hkv", partial="sum", head_reduction=("sum",), query_reduction=_LINEAR),
    along("Hq Hkv", partial="avg", head_reduction=("mean",), query_reduction=_LINEAR),
)
# A causal row's position follows from how many rows there are.
BY_ROWS = along("M", causal=(False,), query_reduction=("none",))
