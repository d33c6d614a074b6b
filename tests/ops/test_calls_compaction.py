"""Calls that users guess of gather_compact, and attention weights that a model has computed already."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing.op_samples import make
from tests.ops.test_calls import assert_same

# --- compaction -------------------------------------------------------------------------------------------------------


def compacted() -> tuple[Tensor, Tensor, Tensor]:
    hidden, ids = torch.randn(2, 6, 3), torch.arange(12).view(2, 6)
    return hidden, ids, torch.tensor([[1, 4, -1], [0, 2, 5]])


@pytest.mark.parametrize("dims", [1, np.int64(1), [1], (1,), -2])
def test_one_tensor_is_compacted(dims: Any) -> None:
    hidden, _, indices = compacted()
    want = tp.gather_compact([hidden], indices, dims=[1])[0]
    got = tp.gather_compact(hidden, indices, dims=dims)
    assert torch.equal(got, want)
    turned = tp.gather_compact(hidden.transpose(0, 1), indices.int(), dims=0, batch_dims=1)
    assert torch.equal(turned, want.transpose(0, 1))


def test_one_dimension_holds_for_all_tensors() -> None:
    hidden, ids, indices = compacted()
    want = tp.gather_compact([hidden, ids], indices, dims=[1, 1])
    for tensors in ([hidden, ids], (hidden, ids)):
        got = tp.gather_compact(tensors, indices, dims=1, batch_dims=0)
        assert isinstance(got, list)
        assert_same(got, want)


def test_mappings_keep_their_type_and_what_is_not_named() -> None:
    from transformers import BatchFeature

    hidden, ids, indices = compacted()
    pixels = torch.rand(2, 3, 4, 4)
    want = tp.gather_compact([hidden, ids], indices, dims=[1, 1])
    given = {"hidden": hidden, "ids": ids, "pixels": pixels}
    for tensors in (given, BatchFeature(given)):
        kept = tp.gather_compact(tensors, indices, dims={"hidden": 1, "ids": -1})
        assert type(kept) is type(tensors)
        assert list(kept) == list(given)
        assert_same([kept["hidden"], kept["ids"]], want)
        assert kept["pixels"] is pixels
    both = tp.gather_compact({"hidden": hidden, "turned": hidden.transpose(0, 1)}, indices,
                             dims={"hidden": 1, "turned": 0}, batch_dims={"turned": 1})  # fmt: skip
    assert torch.equal(both["turned"].transpose(0, 1), both["hidden"])
    assert_same(list(tp.gather_compact({"hidden": hidden, "ids": ids}, indices, dims=1).values()), want)


def test_what_minus_one_becomes() -> None:
    """Zeros of the tensor's own kind, which `indices >= 0` tells from tokens."""
    hidden, ids, indices = compacted()
    real = torch.ones(2, 6, dtype=torch.bool)
    kept = tp.gather_compact({"hidden": hidden, "ids": ids + 7, "real": real}, indices, dims=1)
    assert kept["hidden"][0, 2].tolist() == [0.0] * 3
    assert kept["ids"][0, 2].item() == 0
    assert torch.equal(kept["real"], indices >= 0)


def test_other_containers_are_refused_with_what_to_type() -> None:
    from transformers import DynamicCache

    hidden, _, indices = compacted()
    for tensors, dims, message in (
        (
            DynamicCache(),
            1,
            r"tensors must be a list of tensors, .*, got DynamicCache; type compact_cache\(cache, indices\)",
        ),
        ("hidden", 1, "tensors must be a list of tensors, a tensor or a mapping, got str"),
        ([hidden], None, "dims must be an int or a list of one per tensor, got NoneType"),
        ([hidden], "1", "dims must be an int or a list of one per tensor, got str"),
        (
            {"hidden": hidden},
            [1],
            r"dims must be an int or a mapping, as tensors are, got list; type dims=\{'hidden': 1\}",
        ),
        ({"hidden": hidden}, {"ids": 1}, r"dims must name what tensors has, hidden, got 'ids'"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"tokenprune::gather_compact: {message}"):
            tp.gather_compact(tensors, indices, dims=dims)


def test_gradients_reach_one_tensor_and_mappings() -> None:
    hidden, _, indices = compacted()
    hidden.requires_grad_()
    (
        tp.gather_compact(hidden, indices, dims=1).sum() + tp.gather_compact({"x": hidden}, indices, dims=1)["x"].sum()
    ).backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :, 0].tolist() == [0, 2, 0, 0, 2, 0]


def test_containers_compile() -> None:
    torch._dynamo.reset()
    hidden, ids, indices = compacted()

    def both(x: Tensor, ids: Tensor, at: Tensor) -> list[Tensor]:
        return [tp.gather_compact(x, at, dims=1), *tp.gather_compact({"x": x, "ids": ids}, at, dims=1).values()]

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="eager")
    assert_same(compiled(hidden, ids, indices), both(hidden, ids, indices))


# --- weights that a model has computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["mean", "sum", "max", "none"])
@pytest.mark.parametrize("rows", ["mean", "last", "max+last", "sum+mean"])
def test_weights_reduce_to_the_scores_of_the_op(heads: str, rows: str) -> None:
    a = make("cross_attention_scores", "everything").arguments
    a = {name: a[name] for name in ("query", "key", "key_indices", "query_mask", "key_mask") if name in a}
    batch, keys = a["key"].shape[0], a["key"].shape[2]
    a["key_mask"] = torch.arange(keys).expand(batch, -1) < torch.tensor([keys, keys - 2] * batch)[:batch, None]
    scores, _, lse = tp.cross_attention_scores(**a, head_reduction=heads, query_reduction=rows)
    query, key = a["query"].double(), a["key"].double()
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[-1] ** -0.5
    weights = logits.masked_fill(~a["key_mask"][:, None, None], -torch.inf).softmax(-1)
    rest = {name: a[name] for name in ("key_indices", "query_mask") if name in a}
    got = tp.reduce_attention(weights.float(), **rest, head_reduction=heads, query_reduction=rows)
    assert (got.shape, got.dtype, got.requires_grad) == (scores.shape, torch.float32, False)
    torch.testing.assert_close(got, scores, rtol=2e-5, atol=1e-6)
    assert lse.dim() == 3


def test_weights_of_masked_keys_count_nothing() -> None:
    weights = torch.rand(1, 2, 3, 4)
    mask = torch.tensor([[True, False, True, True]])
    got = tp.reduce_attention(weights.half(), key_mask=mask)
    torch.testing.assert_close(got, torch.where(mask, weights.half().float().mean((1, 2)), 0))
    assert tp.reduce_attention(weights.double()).dtype == torch.float64
    assert torch.equal(tp.reduce_attention(weights, key_indices=torch.tensor([[3, -1]]).int())[:, 1], torch.zeros(1))


def test_wrong_weights_are_named() -> None:
    layers = (torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4))
    with pytest.raises(
        TypeError, match=r"weights must be a tensor, got tuple; type weights\[i\] for one of its 2 tensors"
    ):
        tp.reduce_attention(layers)
    with pytest.raises(ValueError, match=r"reduce_attention: weights must have shape \[B, Hq, M, N\], got \[3, 4\]"):
        tp.reduce_attention(layers[0][0, 0])
    with pytest.raises(ValueError, match="head_reduction must be one of mean, sum, max, none, got 'avg'"):
        tp.reduce_attention(layers[0], head_reduction="avg")


def test_a_reduction_of_weights_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tp.reduce_attention, fullgraph=True, dynamic=True, backend="eager")
    weights = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(
        compiled(weights, query_reduction="max+last"), tp.reduce_attention(weights, query_reduction="max+last")
    )
