"""No call of an op takes more launches than docs/kernels.md says, on both sides of every threshold of the planners, and
launches of a call overlap where the device lets them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
import tokenprune_kernels as tp
from bench.gpu_suite.predictions import PAGE, read_page
from testing.cases import NO_EMULATOR
from tokenprune_kernels._op import OPS, public_ops

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
Call = Callable[[], Any]


@functools.cache
def launches() -> dict[str, int]:
    """By op, or by what the page says of some calls of an op behind a comma."""
    lines = read_page(PAGE.read_text())
    return {line.op: line.launches for line in lines}


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def attention(which: str, heads: int, key_heads: int, rows: int, keys: int, dim: int = 8, **options: Any) -> Call:
    query, key = randn(1, heads, rows, dim), randn(1, key_heads, keys, dim)
    if which == "attention_scores":
        return lambda: tp.attention_scores(query, key, torch.zeros(1, heads, rows), **options)
    op = tp.cross_attention_scores if which == "cross_attention_scores" else tp.attention_entropy
    return lambda: op(query, key, **options)


def attention_calls(which: str) -> Iterator[Call]:
    # Thin and wide tiles; heads shared out over clusters and teams, or few of them; keys, then rows, that are split.
    sizes = ((1, 1, 1, 65), (32, 32, 1, 200), (32, 32, 64, 100), (28, 4, 16, 130), (2, 2, 17, 700), (1, 1, 1090, 70),
             (2, 2, 700, 5), (1, 1, 300, 2000))  # fmt: skip
    for heads, key_heads, rows, keys in sizes:
        yield attention(which, heads, key_heads, rows, keys)
    yield attention(which, 2, 1, 65, 200, dim=300)  # too many channels for a resident operand
    if which != "attention_entropy":
        for reduction in ("sum", "max", "none"):
            yield attention(which, 4, 2, 70, 200, head_reduction=reduction)
        yield attention(which, 4, 2, 70, 200, query_reduction="+".join(["max"] * 32))
        for reduction in ("last", "none"):
            yield attention(which, 4, 2, 70, 200, query_reduction=reduction)


def similarity_calls() -> Iterator[Call]:
    for n, queries, dim in ((20, 1, 8), (20, 8, 8), (20, 9, 8), (70, 70, 600), (2200, 1, 8), (600, 9, 260)):
        yield lambda n=n, q=queries, d=dim: tp.cosine_scores(randn(1, n, d), randn(1, q, d))


def paired_calls() -> Iterator[Call]:
    for batch, n, dim in ((1, 1, 8), (2, 5, 5), (1, 3, 2000), (3, 200, 40)):
        video = randn(batch + 1, n, dim)
        yield lambda video=video: tp.paired_cosine(video[1:], video[:-1])


def contrastive_calls() -> Iterator[Call]:
    for anchors, references in ((1, 0), (1, 1), (4, 4), (4, 5), (9, 1), (9, 32), (9, 40), (9, 128), (9, 160)):
        rows = torch.arange(200)[None]
        listed = rows[:, :anchors], rows[:, anchors : anchors + references]
        yield lambda listed=listed: tp.contrastive_scores(randn(1, 200, 8), *listed)


def repulsion_calls() -> Iterator[Call]:
    points = torch.rand(1, 130, 2)
    for tokens, fields in ((1000, 64), (1, 64), (1, 0)):  # a matrix of cosines, points, rounds
        for first in ("outlier", "isolated", "index"):
            for more in ({}, {"seed_indices": torch.arange(70)[None]}, {"energy": torch.rand(1, 130)},
                         {"positions": points, "potential": "riesz", "aggregate": "sum"}):  # fmt: skip
                call = functools.partial(tp.repulsion_sample, randn(1, 130, 2), 20, first=first, **more)
                yield functools.partial(with_limits, tokens, fields, call)


def with_limits(tokens: int, fields: int, call: Call) -> Any:
    """A matrix of cosines for that many tokens at most, points for so many fields."""
    usual = module.GRAM_TOKEN_LIMIT, module.GRAM_BYTE_LIMIT, module.POINT_FIELD_LIMIT, module.ROUND_LIMIT
    module.set_repulsion_limits(tokens, usual[1], fields, usual[3])
    try:
        return call()
    finally:
        module.set_repulsion_limits(*usual)


def dpp_calls() -> Iterator[Call]:
    for limit in (1000, 0):  # a matrix of cosines, and the features in every step
        for batch, tokens, k in ((1, 1, 1), (2, 130, 20)):
            call = functools.partial(tp.dpp_sample, randn(batch, tokens, 8), k)
            yield functools.partial(with_limits, limit, 0, call)


def coverage_calls() -> Iterator[Call]:
    """The state of a block in shared memory, and outside."""
    for batch, rows, tokens in ((1, 0, 5), (1, 1, 1), (2, 70, 130), (1, 30000, 9)):
        yield functools.partial(tp.coverage_sample, randn(batch, rows, tokens), 5)


def nms_calls() -> Iterator[Call]:
    for side, k, dim in ((6, 1, 8), (6, 2, 8), (6, 3, 8), (12, 60, 40), (20, 5, 8)):
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()[None]
        yield lambda grid=grid, k=k, d=dim: tp.spatial_semantic_nms(
            torch.rand(1, grid.shape[1]), randn(1, grid.shape[1], d), grid, k
        )


def merging_calls() -> Iterator[Call]:
    joined = torch.zeros(1, 70, dtype=torch.int64)
    for n, k, dim in ((1, 1, 8), (70, 5, 8), (70, 66, 600), (70, 0, 8)):
        targets = torch.arange(k)[None]
        for more in ({}, {"metric": "euclidean"}, {"assignment": joined[:, :n].clamp_max(k - 1)}):
            yield functools.partial(tp.merge_tokens, randn(1, n, dim), targets, **more)


def density_calls() -> Iterator[Call]:
    for batch, n, dim in ((1, 1, 8), (2, 70, 8), (1, 70, 600), (1, 0, 8)):
        yield lambda b=batch, n=n, d=dim: tp.density_peaks(randn(b, n, d), 5)


def selection_calls(which: str) -> Iterator[Call]:
    for batch, n in ((1, 1), (3, 500), (1, 1025), (1, 16384), (1, 16400)):
        k = min(n, 40)
        yield {
            "select_topk": lambda batch=batch, n=n, k=k: tp.select_topk(torch.rand(batch, n), k),
            "select_two_tailed": lambda batch=batch, n=n, k=k: tp.select_two_tailed(
                torch.rand(batch, n), torch.ones(batch, dtype=torch.int64), k
            ),
            "select_mixture": lambda batch=batch, n=n, k=k: tp.select_mixture(
                torch.rand(batch, n), torch.rand(batch, n), k
            ),
            "mask_to_indices": lambda batch=batch, n=n, k=k: tp.mask_to_indices(torch.rand(batch, n) < 0.5, k),
            "score_entropy": lambda batch=batch, n=n: tp.score_entropy(torch.rand(batch, n)),
        }[which]


def grouped_calls() -> Iterator[Call]:
    for batch, n, groups in ((1, 1, 1), (2, 500, 7), (1, 9000, 32), (1, 40000, 3), (1, 3000, 2000), (1, 3000, 6000)):
        tokens = torch.randint(0, groups, (batch, n)), torch.randint(0, 3, (batch, groups))
        yield lambda batch=batch, n=n, of=tokens: tp.select_grouped_topk(torch.rand(batch, n), *of, n)


def compaction_calls(gradient: bool) -> Iterator[Call]:
    for tensors, shapes in ((1, 1), (108, 1), (16, 16)):
        values = [torch.rand(1, 9, 2 + (i % shapes), requires_grad=gradient) for i in range(tensors)]
        kept = torch.tensor([[0, 4, 5]])

        def call(values: list[Tensor] = values, kept: Tensor = kept) -> None:
            out = tp.gather_compact(values, kept, dims=[1] * len(values))
            if gradient:
                module.take_launches()
                torch.autograd.backward(out, [torch.ones_like(t) for t in out])

        yield call


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "attention_entropy": lambda: attention_calls("attention_entropy"),
    "attention_scores": lambda: attention_calls("attention_scores"),
    "cross_attention_scores": lambda: attention_calls("cross_attention_scores"),
    "cross_attention_scores, cosine": lambda: iter(
        [attention("cross_attention_scores", *sizes, cosine=True) for sizes in ((1, 1, 64, 70, 300), (1, 1, 1090, 70))]
    ),
    "cosine_scores": similarity_calls,
    "contrastive_scores": contrastive_calls,
    "paired_cosine": paired_calls,
    "merge_tokens": merging_calls,
    "density_peaks": density_calls,
    "repulsion_sample": repulsion_calls,
    "dpp_sample": dpp_calls,
    "coverage_sample": coverage_calls,
    "spatial_semantic_nms": nms_calls,
    "gather_compact": lambda: compaction_calls(False),
    "gather_compact, gradient": lambda: compaction_calls(True),
    "select_grouped_topk": grouped_calls,
    **{
        op: functools.partial(selection_calls, op)
        for op in ("select_topk", "select_two_tailed", "select_mixture", "mask_to_indices", "score_entropy")
    },
}


def test_the_page_has_every_op_with_a_cuda_kernel() -> None:
    assert set(CALLS) == set(launches())
    public = {name for name in public_ops() if "cuda" in OPS[name].backends}
    assert public == {op.split(",")[0] for op in CALLS}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(("architecture", "multiprocessors"), [(80, 108), (90, 132), (90, 4)])
def test_an_op_takes_no_more_launches_than_the_page_says(op: str, architecture: int, multiprocessors: int) -> None:
    module.settings().architecture, module.settings().sm_count = architecture, multiprocessors
    most = 0
    for call in CALLS[op]():
        module.take_launches()
        with tp.use_backend("emulator"):
            call()
        taken = module.take_launches()
        names = [launch["kernel"].split("<")[0] for launch in taken]
        assert len(names) <= launches()[op], f"{op} took {', '.join(names)}"
        # A gradient is two calls of ops, of one launch each.
        overlap = architecture == 90 and not op.endswith("gradient")
        want = [overlap and number > 0 and not launch["cooperative"] for number, launch in enumerate(taken)]
        assert [launch["dependent"] for launch in taken] == want, f"{op} took {', '.join(names)}"
        most = max(most, len(names))
    if architecture == 90 and multiprocessors == 132:
        assert most == launches()[op], f"no call of {op} takes the {launches()[op]} launches that the page says"
