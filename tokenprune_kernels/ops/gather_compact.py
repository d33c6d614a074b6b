"""torch.ops.tokenprune.gather_compact: its description and its Python function."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, overload

from torch import Tensor

from .._advice import of_value
from .._backend import call
from .._checks import Sizes, fail, is_bounded, refuse_not_dense, refuse_size, shape_text
from .._op import KERNELS, Count, PerTensor, Rule, Tensors, indices, op, picks


def _check_sources(
    op: str,
    sizes: Sizes,
    tensors: Sequence[Tensor],
    indices: Tensor,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None,
) -> None:
    """csrc/args/compaction.h has the same in C++."""
    if not isinstance(tensors, (list, tuple)):
        cached = "type compact_cache(cache, indices), of tokenprune_kernels.integrations.transformers"
        expected = "be a list of tensors, a tensor or a mapping"
        fail(TypeError, op, "tensors", expected, type(tensors).__name__, cached if hasattr(tensors, "layers") else "")
    for name, listed in (("dims", dims), ("batch_dims", batch_dims)):
        if (isinstance(listed, (list, tuple)) and len(listed) == len(tensors)) or (listed is None and name != "dims"):
            continue
        if not isinstance(listed, (list, tuple)):
            fail(TypeError, op, name, "be an int or a list of one per tensor", type(listed).__name__)
        fail(ValueError, op, name, f"have one entry per tensor ({len(tensors)})", len(listed))
    batch, device = sizes["B"], indices.device
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            name = f"tensors[{i}]"
            fail(TypeError, op, name, "be a tensor", type(t).__name__, of_value(name, t))
        if t.is_nested:
            refuse_not_dense(f"tokenprune::{op}", f"tensors[{i}]", t)
        rank, dim, batch_dim = t.dim(), dims[i], 0 if batch_dims is None else batch_dims[i]
        if not -rank <= dim < rank:
            fail(ValueError, op, f"dims[{i}]", f"lie in [{-rank}, {rank})", dim)
        if not -rank <= batch_dim < rank:
            fail(ValueError, op, f"batch_dims[{i}]", f"lie in [{-rank}, {rank})", batch_dim)
        if dim % rank == batch_dim % rank:
            fail(ValueError, op, f"dims[{i}]", f"differ from batch_dims[{i}] = {batch_dim}", dim)
        if t.shape[batch_dim] != batch:
            fail(ValueError, op, f"tensors[{i}]", f"have size B = {batch} in dimension {batch_dim}", shape_text(t))
        if not is_bounded(t):
            refuse_size(op, f"tensors[{i}]", t)
        if t.device != device:
            fail(ValueError, op, f"tensors[{i}]", f"be on {device}", t.device)


def _compacted(
    tensors: Sequence[Tensor], indices: Tensor, dims: Sequence[int], batch_dims: Sequence[int] | None
) -> list[Tensor]:
    kept = []
    for t, dim in zip(tensors, dims, strict=True):
        shape = list(t.shape)
        shape[dim] = indices.shape[1]
        kept.append(t.new_empty(shape))
    return kept


@overload
def gather_compact(
    tensors: Tensor,
    indices: Tensor,
    *,
    dims: PerTensor,
    batch_dims: PerTensor | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def gather_compact(
    tensors: Mapping[str, Tensor],
    indices: Tensor,
    *,
    dims: PerTensor,
    batch_dims: PerTensor | None = None,
    backend: str | None = None,
) -> Any: ...


@overload
def gather_compact(
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: PerTensor,
    batch_dims: PerTensor | None = None,
    backend: str | None = None,
) -> list[Tensor]: ...


@op(indices=indices("B K"), returns={}, rule=Rule(_check_sources), fake=_compacted, backends=KERNELS)
def gather_compact(
    tensors: Tensors,
    indices: Tensor,
    *,
    dims: PerTensor,
    batch_dims: PerTensor | None = None,
    backend: str | None = None,
) -> Any:
    """Keep the selected tokens of every tensor: out[b, ..., n, ...] = t[b, ..., indices[b, n], ...].

    Hidden states, position ids, masks and the KV caches of all layers go through one call, on the GPU one launch.

    Args:
        tensors: a list (or tuple) of tensors of any dtypes and strides, on the device of `indices`; or one tensor, or a
            mapping (a dict, a BatchFeature), and the result is one too. Of a transformers cache,
            `integrations.transformers.compact_cache` keeps tokens.
        indices: [B, K] int64, the tokens to keep; -1 gives zeros: hidden states of 0.0, False in a mask, position and
            token id 0. The selecting ops return this, and `indices >= 0` is the mask of what is real.
        dims: for each tensor its token dimension, negative counts from the back; one integer holds for all. For a
            mapping {name: dimension} too: entries without one stay as they are.
        batch_dims: for each tensor its batch dimension (of size B), in the same ways; default 0 for all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        A list with, for each tensor, a contiguous one with K in place of its token dimension. Differentiable in forward
        and backward mode, any number of times; indices must be unique within a sample for the gradient to be right.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: an index lies outside [-1, tokens); on GPUs only with TOKENPRUNE_CHECK_INDICES=1.

    >>> import torch, tokenprune_kernels as tp
    >>> hidden = torch.arange(8.0).view(1, 4, 2)  # [B, T, C]
    >>> positions = torch.arange(12).view(3, 1, 4)  # [3, B, T], as multimodal rotary embeddings have them
    >>> indices, _ = tp.select_topk(torch.tensor([[0.2, 0.9, 0.1, 0.8]]), 2)
    >>> hidden, positions = tp.gather_compact([hidden, positions], indices, dims=[1, 2], batch_dims=[0, 1])
    >>> hidden
    tensor([[[2., 3.],
             [6., 7.]]])
    >>> positions[:, 0]
    tensor([[ 1,  3],
            [ 5,  7],
            [ 9, 11]])
    >>> inputs = {"input_ids": torch.tensor([[7, 8, 9, 10]]), "pixel_values": torch.zeros(1, 3, 2, 2)}
    >>> tp.gather_compact(inputs, indices, dims={"input_ids": 1})["input_ids"]
    tensor([[ 8, 10]])
    """
    if type(tensors) is list and type(dims) is list and (batch_dims is None or type(batch_dims) is list):
        return call("gather_compact", backend, tensors, indices, dims=dims, batch_dims=batch_dims)
    if isinstance(tensors, Mapping):
        return _of_mapping(tensors, indices, dims, batch_dims, backend)
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    kept: list[Tensor] = call(
        "gather_compact",
        backend,
        listed,
        indices,
        dims=_for_each(listed, dims),
        batch_dims=_for_each(listed, batch_dims),
    )
    return kept[0] if isinstance(tensors, Tensor) else kept


def _for_each(tensors: Any, dims: Any) -> Any:
    """The numbers of a list of tensors; what is neither one nor a list is left to the check."""
    if isinstance(dims, SupportsIndex):
        return [int(dims)] * len(tensors) if isinstance(tensors, (list, tuple)) else [int(dims)]
    return list(dims) if isinstance(dims, tuple) else dims


def _of_mapping(
    tensors: Mapping[str, Tensor], indices: Tensor, dims: Any, batch_dims: Any, backend: str | None
) -> Mapping[str, Tensor]:
    """A mapping of the same type, whose other entries stay."""
    if isinstance(dims, Mapping):
        named = dict(dims)
    elif isinstance(dims, SupportsIndex):
        named = dict.fromkeys(tensors, int(dims))
    else:
        fail(
            TypeError, "gather_compact", "dims", "be an int or a mapping, as tensors are", type(dims).__name__,
            f"type dims={{{', '.join(f'{name!r}: 1' for name in tensors)}}} for those to compact",
        )  # fmt: skip
    for name in named:
        if name not in tensors:
            fail(ValueError, "gather_compact", "dims", f"name what tensors has, {', '.join(tensors)}", repr(name))
    of_batch = [batch_dims.get(name, 0) for name in named] if isinstance(batch_dims, Mapping) else batch_dims
    kept = gather_compact(
        [tensors[name] for name in named], indices, dims=list(named.values()), batch_dims=of_batch, backend=backend
    )
    made: Any = type(tensors)
    return made({**tensors, **dict(zip(named, kept, strict=True))})


@op(indices=indices("B K"), size=Count(), returns=picks("B size"), backends=KERNELS)
def _invert_indices(indices: Tensor, size: int) -> Tensor:
    """[B, size]: for each token the slot n with indices[b, n] = token, or -1; for the gradient of a gather."""
    return call("_invert_indices", None, indices, size)
