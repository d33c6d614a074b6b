"""The ops on DTensors, as every rank runs them: each result is compared with that of whole, plain tensors."""

import contextlib
import functools
import io
import random
import runpy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import local_map

import tokenprune_kernels as tp
from testing import ROOT
from testing.op_inputs import Sizes, integers
from testing.op_samples import SAMPLES, Call, make, map_tensors, output_batch_dims, run_op, tensors, with_arguments
from tests.distributed.ranks import Cases
from tokenprune_kernels._op import OPS, Sharding, TensorKind
from tokenprune_kernels.distributed import merge_entropy, merge_lse

SIZES = Sizes(batch=5, heads=8, kv_heads=4)  # uneven for 2 and for 4 ranks: samples, tokens, rows
TRIALS = 3
# A sum over heads is added in another order, and vector code takes other lanes for other rows.
ROUNDINGS = 1e-6


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def meshes() -> list[DeviceMesh]:
    return [mesh(), mesh(2, 2)] if dist.get_world_size() == 4 else [mesh()]


def spread(t: Tensor, on: DeviceMesh, placements: list[Placement]) -> DTensor:
    """The tensor, whole on every rank, as a DTensor; where it is partial, the first rank has everything."""
    summed = [d for d, p in enumerate(placements) if p.is_partial()]
    parts = distribute_tensor(t, on, [Replicate() if d in summed else p for d, p in enumerate(placements)])
    if not summed:
        return parts
    local = parts.to_local() * all(on.get_local_rank(d) == 0 for d in summed)
    return DTensor.from_local(local, on, placements, run_check=False, shape=t.shape, stride=t.stride())


def compare(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        whole = g.full_tensor()
        assert (whole.shape, whole.dtype, whole.stride()) == (w.shape, w.dtype, w.stride())
        if w.is_floating_point():
            torch.testing.assert_close(whole, w, rtol=ROUNDINGS, atol=ROUNDINGS)
        else:
            assert torch.equal(whole, w)


def run_without_communication(call: Call) -> list[Tensor]:
    with CommDebugMode() as talk:
        got = run_op(call)
    assert talk.get_total_counts() == 0, talk.get_comm_counts()
    return got


def by(op: str, sharding: Sharding, call: Call) -> Callable[[str], list[Placement]]:
    """The placement that the description of an op has for each of its tensors."""
    batch_dims = {name: dim for name, _, dim in tensors(call)}

    def placement(name: str) -> list[Placement]:
        if sharding.letters == ("B",):
            return [Shard(batch_dims[name])]
        (kind,) = (a.kind for a in OPS[op].arguments if a.name == name)
        assert isinstance(kind, TensorKind)
        found = [Shard(d) for d, letter in enumerate(kind.shape) if letter in sharding.letters]
        return [*found, Replicate()][:1]

    return placement


def as_described(op: str, sample: str) -> None:
    """Tensors split as one of the op's shardings has it stay where they are, and the result is right."""
    for sharding in OPS[op].shardings:
        call = make(op, sample, SIZES)
        for name, among in sharding.only.items():
            if name == "query_reduction":  # those that can be joined, or, in its sample, the one that stands alone
                joined = "+".join(word for word in among if word != "none")
                among = ("none",) if call.arguments.get(name) == "none" or not joined else (joined,)
            call = with_arguments(call, **{name: among[0]})
        place = by(op, sharding, call)
        split = {name: spread(t, mesh(), place(name)) for name, t, _ in tensors(call)}
        got = run_without_communication(map_tensors(call, lambda name, _, split=split: split[name]))
        compare(got, run_op(call))
        for g, dim in zip(got, output_batch_dims(call), strict=True):
            (placement,) = g.placements
            assert placement == Shard(dim) if sharding.letters == ("B",) else not placement.is_replicate()


def anywhere(op: str, sample: str) -> None:
    """However the tensors lie, split, whole or partial, the result is right."""
    call, draw = make(op, sample, SIZES), random.Random(f"{op} {sample}")  # the same on all ranks
    want = run_op(call)
    for on in meshes():
        for _ in range(TRIALS):

            def somewhere(_: str, t: Tensor, on: DeviceMesh = on) -> DTensor:
                possible = [Replicate(), *map(Shard, range(t.dim()))]
                if t.dtype != torch.bool and bool(t.isfinite().all()):
                    possible.append(Partial())
                return spread(t, on, [draw.choice(possible) for _ in range(on.ndim)])

            compare(run_op(map_tensors(call, somewhere)), want)


def samples_and_heads() -> None:
    """Data-parallel in one dimension of the mesh, tensor-parallel in the other: 2 of 4 key heads on a rank."""
    if dist.get_world_size() < 4:
        return
    call = make("cross_attention_scores", "plain", Sizes(heads=4, kv_heads=2))
    split: list[Placement] = [Shard(0), Shard(1)]
    got = run_without_communication(map_tensors(call, lambda _, t: spread(t, mesh(2, 2), split)))
    assert [g.placements for g in got] == [(Shard(0), Partial("avg")), *[(Shard(0), Shard(1))] * 2]
    compare(got, run_op(call))


def options_change_the_reduction() -> None:
    """What torch's engine would remember of the first call is not right for the next."""
    call = make("cross_attention_scores", "plain", SIZES)
    for reduction, placement in (("mean", Partial("avg")), ("sum", Partial("sum")), ("max", Replicate())):
        asked = with_arguments(call, head_reduction=reduction)
        got = run_op(map_tensors(asked, lambda _, t: spread(t, mesh(), [Shard(1)])))
        assert got[0].placements == (placement,)
        compare(got, run_op(asked))


def rows_are_reduced_after_heads() -> None:
    """The maximum over rows is no part of a maximum while the heads are not together."""
    call = make("cross_attention_scores", "plain", SIZES)
    for heads, rows in (("mean", "max"), ("sum", "mean+max"), ("max", "last")):
        asked = with_arguments(call, head_reduction=heads, query_reduction=rows)
        compare(run_op(map_tensors(asked, lambda _, t: spread(t, mesh(), [Shard(1)]))), run_op(asked))


def causal_rows_know_where_they_are() -> None:
    """Without `query_positions`, a row's position follows from how many rows and keys there are in all."""
    for op in ("attention_entropy", "cross_attention_scores", "attention_scores"):
        call = with_arguments(make(op, "plain", SIZES), causal=True)
        for split in ({"query": 2, "lse": 2}, {"key": 2}):
            got = run_op(map_tensors(call, lambda name, t, split=split: spread(
                t, mesh(), [Shard(split[name]) if name in split else Replicate()]
            )))  # fmt: skip
            compare(got, run_op(call))


def heads_that_do_not_divide_are_gathered() -> None:
    """Of 3 key heads and 6 query heads, halves would hold heads of different groups."""
    call = make("attention_entropy", "plain", Sizes(heads=6, kv_heads=3))
    got = run_op(map_tensors(call, lambda _, t: spread(t, mesh(), [Shard(1)])))
    assert all(g.placements == (Replicate(),) for g in got)
    compare(got, run_op(call))


def a_cache_split_by_heads_stays_split() -> None:
    call = make("gather_compact", "plain", SIZES)
    hidden, cache = call.arguments["tensors"][0], call.arguments["tensors"][3]
    indices = call.arguments["indices"]
    want = tp.gather_compact([hidden, cache], indices, dims=[1, 2])
    got = tp.gather_compact(
        [spread(hidden, mesh(), [Replicate()]), spread(cache, mesh(), [Shard(1)])],
        spread(indices, mesh(), [Replicate()]), dims=[1, 2],
    )  # fmt: skip
    assert [g.placements for g in got] == [(Replicate(),), (Shard(1),)]
    compare(got, want)


def gradients_of_a_gather() -> None:
    hidden = make("gather_compact", "plain", SIZES).arguments["tensors"][0]
    indices = make("gather_compact", "plain", SIZES).arguments["indices"]
    plain = hidden.clone().requires_grad_()
    kept = tp.gather_compact([plain], indices, dims=[1])[0]
    (kept * kept).sum().backward()
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        split = spread(hidden, mesh(), [placement]).requires_grad_()
        kept = tp.gather_compact([split], spread(indices, mesh(), [Replicate()]), dims=[1])[0]
        (kept * kept).sum().backward()
        assert torch.equal(split.grad.full_tensor(), plain.grad)


def compiled() -> None:
    if dist.get_world_size() > 2:  # seconds on every rank, and nothing is new with more
        return
    call = make("spatial_semantic_nms", "plain", SIZES)
    a = call.arguments
    split = [spread(a[name], mesh(), [Shard(0)]) for name in ("scores", "features", "positions")]

    def prune(scores: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        return tp.spatial_semantic_nms(scores * 2, features, positions, a["k"])[0]

    graph = torch.compile(prune, fullgraph=True, backend="aot_eager")
    compare([graph(*split)], [prune(a["scores"], a["features"], a["positions"])])


def errors() -> None:
    scores, mask = torch.rand(4, 6), torch.ones(4, 6, dtype=torch.bool)
    split, op = spread(scores, mesh(), [Shard(0)]), torch.ops.tokenprune
    with pytest.raises(RuntimeError, match="select_topk: mask must be a DTensor, as"):
        op.select_topk(split, 2, mask=mask)
    with pytest.raises(RuntimeError, match="paired_cosine: a must be a DTensor, as"):
        op.paired_cosine(scores[None], split[None])
    with pytest.raises(RuntimeError, match=r"select_topk: mask must have shape \[B, N\] = \[4, 6\], got \[4, 5\]"):
        op.select_topk(split, 2, mask=spread(mask[:, 1:], mesh(), [Shard(0)]))
    indices = spread(torch.zeros(4, 1, dtype=torch.int64), mesh(), [Replicate()])
    with pytest.raises(RuntimeError, match=r"gather_compact: tensors\[1\] must be a DTensor"):
        op.gather_compact([split, scores], indices, dims=[1, 1])
    other = mesh(1, dist.get_world_size())
    with pytest.raises(RuntimeError, match="select_topk: mask must be on DeviceMesh"):
        op.select_topk(split, 2, mask=spread(mask, other, [Replicate(), Shard(0)]))


def keys_apart(causal: bool) -> None:
    """Every rank has other keys; entropies and log-sum-exps meet, keys do not."""
    call, world, rank = make("cross_attention_scores", "plain", SIZES), dist.get_world_size(), dist.get_rank()
    query, key = call.arguments["query"].double(), call.arguments["key"].double()
    own = key.tensor_split(world, dim=2)[rank]
    positions = integers(0, key.shape[2], query.shape[0], query.shape[2], dtype=torch.int64, seed=3)
    first = sum(part.shape[2] for part in key.tensor_split(world, dim=2)[:rank])
    here = {"causal": causal, "query_positions": positions - first}
    everywhere = [torch.empty(2, *query.shape[:3], dtype=query.dtype) for _ in range(world)]
    dist.all_gather(everywhere, torch.stack(tp.attention_entropy(query, own, **here)))
    parts = torch.stack(everywhere)
    lse = merge_lse(parts[:, 1])
    scores = tp.attention_scores(query, own, lse, **here)
    want, want_entropy, want_lse = tp.cross_attention_scores(query, key, causal=causal, query_positions=positions)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(lse, want_lse)
    close(merge_entropy(parts[:, 0], parts[:, 1]), want_entropy)
    close(scores, want.tensor_split(world, dim=1)[rank])


def a_method_by_local_map() -> None:
    features = make("dpp_sample", "plain", SIZES).arguments["features"]
    select = local_map(
        lambda f: tp.methods.divprune(f, 9).indices, out_placements=[Shard(0)], in_placements=([Shard(0)],)
    )
    even = features[:4]
    got = select(spread(even, mesh(), [Shard(0)]))
    assert torch.equal(got.full_tensor(), tp.methods.divprune(even, 9).indices)


def example() -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        runpy.run_path(str(ROOT / "examples" / "dtensor.py"))
    assert told.getvalue() == "scores (Partial(avg),), the tokens of one process: True\n"


def _cases() -> Cases:
    alone = (
        samples_and_heads, rows_are_reduced_after_heads, causal_rows_know_where_they_are,
        options_change_the_reduction, heads_that_do_not_divide_are_gathered,
        a_cache_split_by_heads_stays_split, gradients_of_a_gather, compiled,
        a_method_by_local_map, example, errors,
    )  # fmt: skip
    return {
        **{f"{what.__name__} {op} {sample}": partial(what, op, sample)
           for what in (as_described, anywhere) for op, sample in SAMPLES},
        **{case.__name__: case for case in alone},
        **{f"keys_apart causal={causal}": partial(keys_apart, causal) for causal in (False, True)},
    }  # fmt: skip


CASES = _cases()
