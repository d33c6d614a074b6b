"""What to type instead of a wrong argument, as the end of a message. csrc/checks.h has the same sentences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import FLOATS, INDEX_DTYPES

INTEGERS = (*INDEX_DTYPES, torch.uint8)
_MASK_OF_TOKENS = (
    "pass the mask of the tokens alone, as attention_mask.bool() is before a model makes four dimensions of it, and "
    "causal=True for the rest"
)


def of_dtype(name: str, wanted: torch.dtype | None, t: Tensor) -> str:
    """wanted: None for any of FLOATS."""
    got = t.dtype
    number, integer = got in FLOATS, got in INTEGERS
    if wanted is None:
        return f"type {name}.float()" if integer or got is torch.bool else ""
    if wanted is torch.bool:
        if number and t.dim() == 4:
            return _MASK_OF_TOKENS
        if integer:
            return f"type {name}.bool()"
        return f"type {name} > 0, or {name} == 0 where -inf hides" if number else ""
    if got is torch.bool:
        return f"type mask_to_indices({name})[0] for the indices of True"
    return f"type {name}.long()" if integer or number else ""


def of_shape(name: str, sizes: Sequence[int], t: Tensor, first: bool) -> str:
    """sizes: those wanted, -1 for any; first: no tensor before this one has said how many samples there are."""
    rank = len(sizes)
    if rank == 2 and t.dim() == 4 and t.dtype is torch.bool:
        return _MASK_OF_TOKENS
    if t.dim() != rank - 1:
        return ""
    if rank == 4:
        return (
            f"type {name}.unflatten(-1, (heads, -1)).transpose(1, 2) to split heads, or "
            f"{name}.unsqueeze(0) for a batch of one"
        )
    if first or sizes[0] == 1:
        return f"type {name}.unsqueeze(0) for a batch of one"
    if all(want in (-1, size) for want, size in zip(sizes[1:], t.shape, strict=True)):
        return f"type {name}.expand({sizes[0]}{', -1' * t.dim()}) to share it"
    return ""


def of_value(name: str, value: object) -> str:
    """Of something that is no tensor."""
    if hasattr(value, "indices"):  # a Selection
        return f"type {name}.indices"
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return f"type {name}[i] for one of its {len(value)} tensors, or torch.stack({name})"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"type torch.full((B,), {name})"
    return f"type torch.as_tensor({name})" if isinstance(value, (list, tuple)) or hasattr(value, "__array__") else ""


def of_layout(name: str, t: Tensor) -> str:
    """Of a tensor that is not dense."""
    if t.is_nested:
        return f"type torch.nested.to_padded_tensor({name}, 0.0), with a mask of what is real"
    return f"type {name}.to_dense()" if t.layout != torch.strided else f"type {name}.dequantize()"
