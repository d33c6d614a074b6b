"""Argument checks of every op: they name the op, the argument, what was expected and what came.

The Python functions raise what these raise (ValueError, TypeError); the fakes and the fallback ops turn it into the
RuntimeError that torch.ops promises; the compiled ops check the same conditions in C++ (csrc/args).
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
QUANTIZED = frozenset(
    getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if hasattr(torch, name)
)
HEAD_REDUCTIONS = ("mean", "sum", "max", "none")
QUERY_REDUCTIONS = ("mean", "sum", "max", "last")
# Stride 0 makes dimensions of any size, which no loop gets through. No argument may have more elements than this, which
# is beyond every memory.
MOST_ELEMENTS, _MOST = 1 << 40, "2^40"
_is_compiling = torch.compiler.is_compiling


def _fail(error: type[Exception], op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise error(f"tokenprune::{op}: {argument} must {expected}, got {got}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _bounded(op: str, counted: str, k: int, **tensors: Tensor | None) -> None:
    """No tensor has 2^40 elements, nor is that many results of each sample asked for.

    One call for all arguments of an op, because every call pays for it. A size of 0 counts as 1: it ends no loop over
    the other dimensions. What is symbolic passes without leaving a guard; the op checks the real sizes when it runs.
    """
    if _is_compiling():
        return
    for name, t in tensors.items():
        if t is None:
            continue
        try:
            elements = t.numel()
        except RuntimeError:  # the product overflows
            elements = 0
        if type(elements) is not int or 0 < elements < MOST_ELEMENTS:
            continue
        if math.prod(filter(None, t.shape)) >= MOST_ELEMENTS:
            _fail(ValueError, op, name, f"have fewer than {_MOST} elements (a size of 0 counts as 1)", _shape(t))
    if type(k) is int and k >= MOST_ELEMENTS:
        _fail(ValueError, op, counted, f"keep B * {counted} below {_MOST}", k)


def _dense(op: str, name: str, t: Tensor) -> None:
    quantized = t.dtype in QUANTIZED  # under vmap is_quantized is False, and torch ends the process
    if t.layout != torch.strided or t.is_nested or quantized:
        got = "a nested one" if t.is_nested else "a quantized one" if quantized else f"one of {t.layout}"
        _fail(TypeError, op, name, "be a dense tensor", got)
    # The dispatcher makes zeros in memory out of a tensor without any, unless the caller has turned that off.
    if t._is_zerotensor() and torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ZeroTensor):
        _fail(TypeError, op, name, "have memory", "a tensor without")


def on_dense(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, given dense tensors only.

    The dispatcher sees to it for compiled kernels. What is not compiled serves everything else, and has to look.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if isinstance(value, Tensor):
                    _dense(op, name, value)
                elif isinstance(value, (list, tuple)):
                    for i, t in enumerate(value):
                        if isinstance(t, Tensor):
                            _dense(op, f"{name}[{i}]", t)
        return function(*args, **kwargs)

    return run


def _floating(op: str, name: str, t: Tensor, layout: str, rank: int) -> None:
    """A required floating-point tensor of the given rank; `layout` is its shape in words, as [B, N, C]."""
    if not isinstance(t, Tensor):
        _fail(TypeError, op, name, "be a tensor", type(t).__name__)
    if t.dtype not in FLOATS:
        _fail(TypeError, op, name, "be float16, bfloat16, float32 or float64", t.dtype)
    if t.is_nested:
        _fail(TypeError, op, name, "be a dense tensor", "a nested one")
    if t.dim() != rank:
        _fail(ValueError, op, name, f"have shape {layout}", _shape(t))


def _beside(
    op: str, name: str, t: Tensor | None, first: Tensor, layout: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """An optional tensor on the device of `first`; -1 in `shape` leaves that size free; dtype None means any float."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        _fail(TypeError, op, name, "be a tensor or None", type(t).__name__)
    if t.is_nested:
        _fail(TypeError, op, name, "be a dense tensor", "a nested one")
    if (t.dtype not in FLOATS) if dtype is None else (t.dtype != dtype):
        _fail(TypeError, op, name, "be floating point" if dtype is None else f"be {dtype}", t.dtype)
    fits = len(t.shape) == len(shape)
    for want, size in zip(shape, t.shape, strict=False):  # any() over a generator takes twice as long, in every call
        fits = fits and (want == -1 or want == size)
    if not fits:
        sizes = ", ".join("any" if s == -1 else str(s) for s in shape)
        _fail(ValueError, op, name, f"have shape {layout} = [{sizes}]", _shape(t))
    if t is not first and t.device != first.device:
        _fail(ValueError, op, name, f"be on {first.device}", t.device)


def _count(op: str, name: str, k: int) -> None:
    if not isinstance(k, (int, torch.SymInt)):
        _fail(TypeError, op, name, "be an int", type(k).__name__)
    if k < 0:
        _fail(ValueError, op, name, "be non-negative", k)


def _option(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _fail(ValueError, op, name, f"be one of {', '.join(allowed)}", repr(value))


def _real(op: str, name: str, value: float, low: float, *, above: bool = False, high: float = float("inf")) -> None:
    """A real number in [low, high], or in (low, high] with `above`. NaN is outside."""
    if not isinstance(value, (int, float)):
        _fail(TypeError, op, name, "be a number", type(value).__name__)
    if not ((value > low if above else value >= low) and value <= high):
        _fail(ValueError, op, name, f"be {'>' if above else '>='} {low:g} and <= {high:g}", value)


def attention(
    op: str,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    key_indices: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    head_reduction: str,
    query_reduction: str,
) -> None:
    _floating(op, "query", query, "[B, Hq, M, D]", 4)
    _floating(op, "key", key, "[B, Hkv, N, D]", 4)
    batch, heads, rows, dim = query.shape
    key_batch, key_heads, keys, key_dim = key.shape
    if key.dtype != query.dtype:
        _fail(TypeError, op, "key", f"have the dtype of query ({query.dtype})", key.dtype)
    if key.device != query.device:
        _fail(ValueError, op, "key", f"be on {query.device}", key.device)
    if key_batch != batch or key_dim != dim:
        _fail(ValueError, op, "key", f"have shape [B, Hkv, N, D] = [{batch}, any, any, {dim}]", _shape(key))
    if dim < 1:
        _fail(ValueError, op, "query", "have a last dimension D >= 1", _shape(query))
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        _fail(ValueError, op, "query", f"have a number of heads that is a multiple of Hkv = {key_heads}", heads)
    if lse is None and op == "attention_scores":
        _fail(TypeError, op, "lse", "be a tensor", None)
    _beside(op, "lse", lse, query, "[B, Hq, M]", (batch, heads, rows), None)
    _beside(op, "key_indices", key_indices, query, "[B, V]", (batch, -1), torch.int64)
    _beside(op, "query_mask", query_mask, query, "[B, M]", (batch, rows), torch.bool)
    _beside(op, "key_mask", key_mask, query, "[B, N]", (batch, keys), torch.bool)
    _beside(op, "query_positions", query_positions, query, "[B, M]", (batch, rows), torch.int64)
    _option(op, "head_reduction", head_reduction, HEAD_REDUCTIONS)
    if not isinstance(query_reduction, str):
        _fail(TypeError, op, "query_reduction", "be a string", type(query_reduction).__name__)
    for reduction in query_reduction.split("+"):
        if reduction not in QUERY_REDUCTIONS:
            expected = f"be one of {', '.join(QUERY_REDUCTIONS)}, or several joined by +"
            _fail(ValueError, op, "query_reduction", expected, repr(query_reduction))
    _bounded(op, "", 0, query=query, key=key, key_indices=key_indices)


def score_entropy(scores: Tensor, mask: Tensor | None) -> None:
    _floating("score_entropy", "scores", scores, "[B, N]", 2)
    _beside("score_entropy", "mask", mask, scores, "[B, N]", tuple(scores.shape), torch.bool)
    _bounded("score_entropy", "", 0, scores=scores)


def cosine_scores(features: Tensor, queries: Tensor, query_mask: Tensor | None, reduction: str) -> None:
    op = "cosine_scores"
    _floating(op, "features", features, "[B, N, C]", 3)
    _floating(op, "queries", queries, "[B, M, C]", 3)
    batch, _, channels = features.shape
    _beside(op, "queries", queries, features, "[B, M, C]", (batch, -1, channels), features.dtype)
    _beside(op, "query_mask", query_mask, features, "[B, M]", (batch, queries.shape[1]), torch.bool)
    _option(op, "reduction", reduction, ("max", "mean"))
    _bounded(op, "", 0, features=features, queries=queries)


def contrastive_scores(features: Tensor, anchor_indices: Tensor, reference_indices: Tensor) -> None:
    op = "contrastive_scores"
    _floating(op, "features", features, "[B, N, C]", 3)
    shape = (features.shape[0], -1)
    for name, indices in (("anchor_indices", anchor_indices), ("reference_indices", reference_indices)):
        if indices is None:
            _fail(TypeError, op, name, "be a tensor", None)
        _beside(op, name, indices, features, "[B, A]" if name == "anchor_indices" else "[B, R]", shape, torch.int64)
    _bounded(op, "", 0, features=features, anchor_indices=anchor_indices, reference_indices=reference_indices)


def select_topk(scores: Tensor, k: int, mask: Tensor | None) -> None:
    _floating("select_topk", "scores", scores, "[B, N]", 2)
    _count("select_topk", "k", k)
    _beside("select_topk", "mask", mask, scores, "[B, N]", tuple(scores.shape), torch.bool)
    _bounded("select_topk", "k", k, scores=scores)


def select_two_tailed(scores: Tensor, num_low: Tensor, k: int, mask: Tensor | None) -> None:
    op = "select_two_tailed"
    _floating(op, "scores", scores, "[B, N]", 2)
    if num_low is None:
        _fail(TypeError, op, "num_low", "be a tensor", None)
    _beside(op, "num_low", num_low, scores, "[B]", (scores.shape[0],), torch.int64)
    _count(op, "k", k)
    _beside(op, "mask", mask, scores, "[B, N]", tuple(scores.shape), torch.bool)
    _bounded(op, "k", k, scores=scores)


def select_mixture(text_scores: Tensor, visual_scores: Tensor, k: int, floor: float, mask: Tensor | None) -> None:
    op = "select_mixture"
    _floating(op, "text_scores", text_scores, "[B, N]", 2)
    _floating(op, "visual_scores", visual_scores, "[B, N]", 2)
    shape = tuple(text_scores.shape)
    _beside(op, "visual_scores", visual_scores, text_scores, "[B, N]", shape, None)
    _count(op, "k", k)
    _real(op, "floor", floor, 0.0, high=0.5)
    _beside(op, "mask", mask, text_scores, "[B, N]", shape, torch.bool)
    _bounded(op, "k", k, text_scores=text_scores)


def mask_to_indices(mask: Tensor, capacity: int) -> None:
    op = "mask_to_indices"
    if mask is None:
        _fail(TypeError, op, "mask", "be a tensor", None)
    _beside(op, "mask", mask, mask, "[B, N]", (-1, -1), torch.bool)
    _count(op, "capacity", capacity)
    _bounded(op, "capacity", capacity, mask=mask)


def repulsion_sample(
    features: Tensor,
    k: int,
    positions: Tensor | None,
    seed_indices: Tensor | None,
    energy: Tensor | None,
    mask: Tensor | None,
    potential: str,
    aggregate: str,
    feature_weight: float,
    position_weight: float,
    exponent: float,
    sigma: float,
    epsilon: float,
    first: str,
) -> None:
    op = "repulsion_sample"
    _floating(op, "features", features, "[B, N, C]", 3)
    batch, n, _ = features.shape
    _count(op, "k", k)
    _beside(op, "positions", positions, features, "[B, N, P]", (batch, n, -1), None)
    _beside(op, "seed_indices", seed_indices, features, "[B, S]", (batch, -1), torch.int64)
    _beside(op, "energy", energy, features, "[B, N]", (batch, n), None)
    _beside(op, "mask", mask, features, "[B, N]", (batch, n), torch.bool)
    _option(op, "potential", potential, ("cosine", "riesz", "gaussian"))
    _option(op, "aggregate", aggregate, ("max", "sum"))
    _option(op, "first", first, ("outlier", "isolated", "index"))
    _real(op, "feature_weight", feature_weight, 0.0)
    _real(op, "position_weight", position_weight, 0.0)
    _real(op, "exponent", exponent, 0.0, above=True)
    _real(op, "sigma", sigma, 0.0, above=True)
    _real(op, "epsilon", epsilon, 0.0)
    _bounded(op, "k", k, features=features, positions=positions, seed_indices=seed_indices)


def spatial_semantic_nms(
    scores: Tensor,
    features: Tensor,
    positions: Tensor,
    k: int,
    groups: Tensor | None,
    mask: Tensor | None,
    radius: float,
    sigma_spatial: float,
    sigma_semantic: float,
    mode: str,
    threshold: float,
) -> None:
    op = "spatial_semantic_nms"
    _floating(op, "scores", scores, "[B, N]", 2)
    _floating(op, "features", features, "[B, N, C]", 3)
    _floating(op, "positions", positions, "[B, N, 2]", 3)
    batch, n = scores.shape
    _beside(op, "features", features, scores, "[B, N, C]", (batch, n, -1), None)
    _beside(op, "positions", positions, scores, "[B, N, 2]", (batch, n, 2), None)
    _count(op, "k", k)
    _beside(op, "groups", groups, scores, "[B, N]", (batch, n), torch.int64)
    _beside(op, "mask", mask, scores, "[B, N]", (batch, n), torch.bool)
    _real(op, "radius", radius, 0.0)
    _real(op, "sigma_spatial", sigma_spatial, 0.0, above=True)
    _real(op, "sigma_semantic", sigma_semantic, 0.0, above=True)
    _option(op, "mode", mode, ("soft", "hard"))
    _real(op, "threshold", threshold, float("-inf"))
    _bounded(op, "k", k, features=features, positions=positions)


def gather_compact(
    tensors: Sequence[Tensor], indices: Tensor, dims: Sequence[int], batch_dims: Sequence[int] | None
) -> None:
    op = "gather_compact"
    if not isinstance(tensors, (list, tuple)):
        _fail(TypeError, op, "tensors", "be a list of tensors", type(tensors).__name__)
    if indices is None:
        _fail(TypeError, op, "indices", "be a tensor", None)
    _beside(op, "indices", indices, indices, "[B, K]", (-1, -1), torch.int64)
    if dims is None:
        _fail(TypeError, op, "dims", "be a list of integers", None)
    for name, listed in (("dims", dims), ("batch_dims", batch_dims)):
        if listed is not None and len(listed) != len(tensors):
            _fail(ValueError, op, name, f"have one entry per tensor ({len(tensors)})", len(listed))
    batch, device = indices.shape[0], indices.device
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            _fail(TypeError, op, f"tensors[{i}]", "be a tensor", type(t).__name__)
        if t.is_nested:
            _fail(TypeError, op, f"tensors[{i}]", "be a dense tensor", "a nested one")
        rank, dim, batch_dim = t.dim(), dims[i], 0 if batch_dims is None else batch_dims[i]
        if not -rank <= dim < rank:
            _fail(ValueError, op, f"dims[{i}]", f"lie in [{-rank}, {rank})", dim)
        if not -rank <= batch_dim < rank:
            _fail(ValueError, op, f"batch_dims[{i}]", f"lie in [{-rank}, {rank})", batch_dim)
        if dim % rank == batch_dim % rank:
            _fail(ValueError, op, f"dims[{i}]", f"differ from batch_dims[{i}] = {batch_dim}", dim)
        if t.shape[batch_dim] != batch:
            _fail(ValueError, op, f"tensors[{i}]", f"have size B = {batch} in dimension {batch_dim}", _shape(t))
        if t.device != device:
            _fail(ValueError, op, f"tensors[{i}]", f"be on {device}", t.device)
    _bounded(op, "", 0, indices=indices, **{f"tensors[{i}]": t for i, t in enumerate(tensors)})


def invert_indices(indices: Tensor, size: int) -> None:
    _beside("_invert_indices", "indices", indices, indices, "[B, K]", (-1, -1), torch.int64)
    _count("_invert_indices", "size", size)
    _bounded("_invert_indices", "size", size, indices=indices)
