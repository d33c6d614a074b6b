"""torch.ops.tokenprune.gather_compact: its description and its Python function."""

from collections.abc import Sequence

from torch import Tensor

from .._backend import call
from .._checks import Sizes, fail, is_bounded, refuse_not_dense, refuse_size, shape_text
from .._op import KERNELS, Count, Rule, indices, op, picks


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
        fail(TypeError, op, "tensors", "be a list of tensors", type(tensors).__name__)
    if dims is None:
        fail(TypeError, op, "dims", "be a list of integers", None)
    for name, listed in (("dims", dims), ("batch_dims", batch_dims)):
        if listed is not None and len(listed) != len(tensors):
            fail(ValueError, op, name, f"have one entry per tensor ({len(tensors)})", len(listed))
    batch, device = sizes["B"], indices.device
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            fail(TypeError, op, f"tensors[{i}]", "be a tensor", type(t).__name__)
        if t.is_nested:
            refuse_not_dense(op, f"tensors[{i}]", t)
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


@op(indices=indices("B K"), returns={}, rule=Rule(_check_sources), fake=_compacted, backends=KERNELS)
def gather_compact(
    tensors: Sequence[Tensor],
    indices: Tensor,
    *,
    dims: Sequence[int],
    batch_dims: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Keep the selected tokens of every tensor of the list: out[b, ..., n, ...] = t[b, ..., indices[b, n], ...].

    Hidden states, position ids, masks and the KV caches of all layers go through one call, on the GPU one launch.

    Args:
        tensors: any dtypes and strides, on the device of `indices`.
        indices: [B, K] int64, the tokens to keep; -1 gives zeros. The selecting ops return this.
        dims: for each tensor its token dimension; negative counts from the back.
        batch_dims: for each tensor its batch dimension (of size B); default 0 for all.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        For each tensor a contiguous one with K in place of its token dimension. Differentiable in forward and backward
        mode, any number of times; indices must be unique within a sample for the gradient to be right.

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
    """
    return call("gather_compact", backend, tensors, indices, dims=dims, batch_dims=batch_dims)


@op(indices=indices("B K"), size=Count(), returns=picks("B size"), backends=KERNELS)
def _invert_indices(indices: Tensor, size: int) -> Tensor:
    """[B, size]: for each token the slot n with indices[b, n] = token, or -1; for the gradient of a gather."""
    return call("_invert_indices", None, indices, size)
