"""tp.varlen: packed batches give what every sequence gives by itself, and nothing of cu_seqlens is read on the host."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune_kernels as tp
from testing.cases import over_backends

# (rows, keys) of the sequences: ordinary, without rows, without keys, one of each, empty, and more rows than keys.
LENGTHS = ((3, 20), (0, 7), (5, 0), (1, 1), (0, 0), (9, 4))
HEADS, KEY_HEADS, DIM = 4, 2, 8


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def cuts(t: Tensor, *lengths: int, dim: int = 0) -> tuple[Tensor, ...]:
    return t.split(lengths, dim)


def packed_attention(lengths: tuple[tuple[int, int], ...] = LENGTHS, spare: int = 0) -> tuple[Tensor, ...]:
    """query, key, cu_seqlens_q, cu_seqlens_k and the longest lengths; `spare` tokens of no sequence at the end."""
    rows, keys = zip(*lengths, strict=True)
    query, key = torch.randn(sum(rows) + spare, HEADS, DIM), torch.randn(sum(keys) + spare, KEY_HEADS, DIM)
    return query, key, cu(*rows), cu(*keys), max(rows), max(keys)


def one_by_one(
    arguments: tuple[Any, ...], lengths: tuple[tuple[int, int], ...], masks: dict[str, Tensor], **options: Any
) -> list[Tensor]:
    """The reference's results for every sequence alone, packed; their last dimensions are keys, rows and rows."""
    rows, keys = zip(*lengths, strict=True)
    spare = arguments[0].shape[0] - sum(rows)
    of_rows, of_keys = cuts(arguments[0], *rows, spare), cuts(arguments[1], *keys, spare)
    parts = []
    for b in range(len(lengths)):
        own = {n: cuts(m, *(keys if n == "key_mask" else rows), spare)[b][None] for n, m in masks.items()}
        query, key = of_rows[b].transpose(0, 1)[None], of_keys[b].transpose(0, 1)[None]
        parts.append([t[0] for t in tp.reference.cross_attention_scores(query, key, **own, **options)])
    tails = [part.new_zeros(*part.shape[:-1], spare) for part in parts[0]]
    return [torch.cat([part[i] for part in parts] + [tails[i]], -1) for i in range(3)]


@over_backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "query_reduction": "max+last"},
        {"causal": True, "head_reduction": "none", "masked": True, "positions": True, "query_reduction": "sum"},
        {"cosine": True, "scale": 5.0, "masked": True, "head_reduction": "none", "query_reduction": "mean+max"},
    ],
    ids=["plain", "causal", "everything", "cosine"],
)
def test_packed_attention_equals_each_sequence_alone(backend: str, options: dict[str, Any]) -> None:
    options = dict(options)
    arguments = packed_attention(spare=2)
    query, key = arguments[:2]
    masks = {}
    if options.pop("masked", False):
        masks = {"query_mask": torch.rand(len(query)) < 0.7, "key_mask": torch.rand(len(key)) < 0.7}
    if options.pop("positions", False):
        masks["query_positions"] = torch.randint(-1, 20, (len(query),))
    got = tp.varlen.cross_attention_scores(*arguments, **masks, **options, backend=backend)
    want = one_by_one(arguments, LENGTHS, masks, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    visible = {n: v for n, v in options.items() if not n.endswith("reduction")}
    others = {n: m for n, m in masks.items() if n != "query_mask"}
    for g, w in zip(
        tp.varlen.attention_entropy(*arguments, **others, **visible, backend=backend), got[1:], strict=True
    ):
        assert torch.equal(g, w)
    given = tp.varlen.attention_scores(query, key, got[2], *arguments[2:], **masks, **options, backend=backend)
    torch.testing.assert_close(given, got[0], rtol=1e-5, atol=1e-6)


@over_backends
def test_one_sequence_is_a_batch_of_one(backend: str) -> None:
    query, key, *cut = packed_attention(((9, 30),))
    got = tp.varlen.cross_attention_scores(query, key, *cut, causal=True, backend=backend)
    want = tp.cross_attention_scores(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], causal=True, backend=backend
    )
    assert all(torch.equal(g, w[0]) for g, w in zip(got, want, strict=True))
    scores = got[0]
    indices, kept = tp.varlen.select_topk(scores, 7, cut[1], backend=backend)
    assert torch.equal(indices, tp.select_topk(scores[None], 7, backend=backend)[0][0])
    assert kept.tolist() == [0, 7]


@over_backends
def test_packed_selection_equals_each_sequence_alone(backend: str) -> None:
    lengths = (5, 0, 1, 40, 12)
    scores = torch.randint(-3, 4, (58,)).float()
    scores[[1, 20]] = torch.nan
    cu_seqlens, budgets = cu(*lengths), torch.tensor([2, 3, 1, -1, 9])
    scores = torch.cat([scores, torch.full((3,), 9.0)])  # tokens of no sequence are never selected
    mask = torch.rand(61) < 0.6
    for k in (0, 1, 6, 50):
        for options in ({}, {"mask": mask}, {"budgets": budgets, "largest": False}, {"mask": mask, "budgets": budgets}):
            indices, kept = tp.varlen.select_topk(scores, k, cu_seqlens, **options, backend=backend)
            assert indices.shape == (min(61, 5 * k),)
            assert kept.dtype == torch.int32
            found = []
            for b, part in enumerate(cuts(scores[:58], *lengths)):
                own = {"largest": options.get("largest", True)}
                if "mask" in options:
                    own["mask"] = cuts(mask[:58], *lengths)[b][None]
                if "budgets" in options:
                    own["budgets"] = budgets[b : b + 1]
                chosen, count = tp.reference.select_topk(part[None], k, **own)
                found.append((chosen[0][: int(count)] + cu_seqlens[b]).tolist())
            assert kept.tolist() == cu(*map(len, found)).tolist()
            assert indices[indices >= 0].tolist() == [i for chosen in found for i in chosen]
            assert (indices[int(kept[-1]) :] == -1).all()


@over_backends
def test_what_is_kept_is_a_packed_batch_again(backend: str) -> None:
    scores, hidden = torch.rand(20), torch.randn(20, 6)
    positions, keys = torch.arange(60).view(3, 20), torch.randn(20, 2, 4)
    first, cu_first = tp.varlen.select_topk(scores, 5, cu(3, 9, 0, 8), backend=backend)
    kept, where, cache, left = tp.varlen.gather_compact(
        [hidden, positions, keys, scores], first, dims=[0, 1, -3, 0], backend=backend
    )
    count = int(cu_first[-1])
    assert (len(first), count) == (20, 13)
    for packed, whole in ((kept, hidden), (cache, keys), (where.T, positions.T)):
        assert torch.equal(packed[:count], whole[first[:count]])
        assert not packed[count:].any()
    second, cu_second = tp.varlen.select_topk(left, 2, cu_first, backend=backend)
    directly, cu_directly = tp.varlen.select_topk(scores, 2, cu(3, 9, 0, 8), backend=backend)
    assert torch.equal(first[second[:6]], directly[:6])
    assert torch.equal(cu_second, cu_directly)


class _Calls(TorchDispatchMode):
    """The ops of this package that are called inside, by name, and the tensors of their first arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "tokenprune":
            self.made.append((function._schema.name.split("::")[1], args[0]))
        return function(*args, **(kwargs or {}))


def test_selection_and_compaction_are_one_call_each_on_the_tensors_themselves() -> None:
    scores, hidden = torch.rand(9), torch.randn(9, 4)
    with _Calls() as calls:
        indices, _ = tp.varlen.select_topk(scores, 2, cu(4, 5))
        tp.varlen.gather_compact([hidden, scores], indices, dims=0)
    (selecting, selected), (gathering, gathered) = calls.made
    assert (selecting, gathering) == ("select_grouped_topk", "gather_compact")
    assert selected.data_ptr() == scores.data_ptr()
    assert [t.data_ptr() for t in gathered] == [hidden.data_ptr(), scores.data_ptr()]
    query, key, *cut = packed_attention()
    with _Calls() as calls:
        tp.varlen.attention_entropy(query, key, *cut)
    assert [name for name, _ in calls.made] == ["attention_entropy"] * len(LENGTHS)
    assert [t.data_ptr() for _, t in calls.made if t.numel()] == [query[i].data_ptr() for i in (0, 3, 8, 9)]
    with _Calls() as calls:  # off the CPU
        tp.varlen.attention_entropy(query.to("meta"), key.to("meta"), *(c.to("meta") for c in cut[:2]), *cut[2:])
    made = [name for name, _ in calls.made]
    assert made == ["gather_compact", "gather_compact", "attention_entropy", "gather_compact"]


def test_compaction_is_differentiable() -> None:
    hidden = torch.randn(9, 4, requires_grad=True)
    indices, _ = tp.varlen.select_topk(torch.rand(9), 2, cu(4, 5))
    tp.varlen.gather_compact([hidden], indices)[0].sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(9, 4).index_fill(0, indices, 1.0))
    query, key, *cut = packed_attention(((3, 4),))
    assert not tp.varlen.cross_attention_scores(query.requires_grad_(), key, *cut)[0].requires_grad


@over_backends
@pytest.mark.parametrize("lengths", [(), (0, 0, 0)], ids=["no sequence", "empty ones"])
def test_nothing_but_padding(backend: str, lengths: tuple[int, ...]) -> None:
    none, batch = cu(*lengths), len(lengths)
    for tokens in (0, 4):
        query, key = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, KEY_HEADS, DIM)
        scores, entropy, lse = tp.varlen.cross_attention_scores(query, key, none, none, 0, 3, backend=backend)
        assert torch.equal(scores, torch.zeros(tokens))
        assert torch.equal(entropy, torch.zeros(HEADS, tokens))
        assert torch.equal(lse, torch.zeros(HEADS, tokens))
        indices, kept = tp.varlen.select_topk(torch.rand(tokens), 2, none, backend=backend)
        assert indices.tolist() == [-1] * min(tokens, 2 * batch)
        assert kept.tolist() == [0] * (batch + 1)


def prune(query: Tensor, key: Tensor, hidden: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, ...]:
    scores, _, lse = tp.varlen.cross_attention_scores(query, key, cu_q, cu_k, 6, 20, causal=True)
    again = tp.varlen.attention_scores(query, key, lse, cu_q, cu_k, 6, 20, head_reduction="none")
    indices, kept = tp.varlen.select_topk(scores, 4, cu_k, mask=scores > 0)
    return (*tp.varlen.gather_compact([hidden], indices), kept, again)


def pruned(tokens: int) -> tuple[Tensor, ...]:
    cu_q, cu_k = cu(2, 6, 1), cu(tokens - 19, 19, 0)
    return torch.randn(9, HEADS, DIM), torch.randn(tokens, KEY_HEADS, DIM), torch.randn(tokens, 5), cu_q, cu_k


def test_one_graph_for_all_sizes() -> None:
    graph = torch.compile(prune, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (25, 31):
        arguments = pruned(tokens)
        for g, w in zip(graph(*arguments), prune(*arguments), strict=True):
            torch.testing.assert_close(g, w)


def test_the_host_reads_nothing_of_another_device() -> None:
    """A meta tensor has no values: reading one would raise."""
    arguments = pruned(25)
    for made, want in zip(prune(*(t.to("meta") for t in arguments)), prune(*arguments), strict=True):
        assert (made.shape, made.dtype, made.device.type) == (want.shape, want.dtype, "meta")


def test_bad_cuts_are_refused_by_name() -> None:
    scores = torch.rand(6)

    def select(cu_seqlens: Any, k: Any = 2, **options: Any) -> None:
        tp.varlen.select_topk(scores, k, cu_seqlens, **options)

    for bad, error, expected in (
        ([1, 6], ValueError, r"varlen.select_topk: cu_seqlens must begin with 0, got 1"),
        ([0, 4, 3], ValueError, r"cu_seqlens must not descend, got 3 after 4"),
        ([0, 7], ValueError, r"cu_seqlens must end within the 6 tokens, got 7"),
        ([], ValueError, r"cu_seqlens must have B \+ 1 >= 1 entries, got \[0\]"),
        ([[0, 6]], ValueError, r"cu_seqlens must have shape \[B\+1\], got \[1, 2\]"),
    ):
        with pytest.raises(error, match=expected):
            select(torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, as FlashAttention's, got int64"):
        select(torch.tensor([0, 6]))
    with pytest.raises(TypeError, match=r"cu_seqlens must be a tensor, got list"):
        select([0, 6])
    with pytest.raises(ValueError, match=r"cu_seqlens must be on cpu, got meta"):
        select(cu(6).to("meta"))
    with pytest.raises(TypeError, match=r"k must be an int, got bool"):
        select(cu(6), True)
    with pytest.raises(ValueError, match=r"k must be non-negative, got -1"):
        select(cu(6), -1)
    with pytest.raises(ValueError, match=r"mask must have shape \[6\], got \[5\]"):
        select(cu(6), mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool, got int64"):
        select(cu(6), mask=torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"budgets must have shape \[2\], got \[1\]"):
        select(cu(3, 3), budgets=torch.ones(1, dtype=torch.int64))


def test_bad_packed_attention_is_refused_by_name() -> None:
    query, key, cu_q, cu_k, most_q, most_k = packed_attention(((3, 5), (2, 4)))

    def score(*cut: Any, **options: Any) -> None:
        tp.varlen.cross_attention_scores(query, key, *cut, **options)

    for cut, error, expected in (
        ((cu_q, cu_k, 2, most_k), ValueError, r"cu_seqlens_q must have sequences of at most 2 tokens, got 3"),
        ((cu_q, cu_k, most_q, 4), ValueError, r"cu_seqlens_k must have sequences of at most 4 tokens, got 5"),
        ((cu_q, cu_k, most_q, 5.0), TypeError, r"max_seqlen_k must be an int, got float"),
        ((cu_q, cu(9), most_q, 9), ValueError, r"cu_seqlens_k must have shape \[3\] as cu_seqlens_q, got \[2\]"),
    ):
        with pytest.raises(error, match=f"varlen.cross_attention_scores: {expected}"):
            score(*cut)
    with pytest.raises(ValueError, match=r"query_reduction must reduce the rows, of which sequences have different"):
        score(cu_q, cu_k, most_q, most_k, query_reduction="none")
    with pytest.raises(ValueError, match=r"key_mask must have shape \[9\], got \[5\]"):
        score(cu_q, cu_k, most_q, most_k, key_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query must have shape \[Tq, Hq, D\], got \[1, 5, 4, 8\]"):
        tp.varlen.attention_entropy(query[None], key, cu_q, cu_k, most_q, most_k)
    with pytest.raises(ValueError, match=r"lse must have shape \[Hq, Tq\] = \[any, 5\], got \[4, 4\]"):
        tp.varlen.attention_scores(query, key, torch.zeros(4, 4), cu_q, cu_k, most_q, most_k)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a tensor, got int"):
        tp.varlen.gather_compact([query, 3], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"varlen.gather_compact: tensors must be a list of tensors, got Tensor"):
        tp.varlen.gather_compact(torch.rand(5, 8), torch.zeros(1, dtype=torch.int64))  # its rows would be five tensors
