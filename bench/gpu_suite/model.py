"""How long a row should take on an H200, from what its kernels' loops cost (tests/cuda/costs.csv) and assumed rates.

A launch takes as long as the slowest of its limits, a call as long as its launches one after the other. The limits
of one launch, with the names that `limit_seconds` gives them:

    issue      slots of all warps / (4 a cycle x the multiprocessors that have work)
    tensor     matrix instructions / their rate, likewise
    MUFU       exponentials / 16 a cycle and multiprocessor
    DRAM, L2   bytes / the rate; what a launch before it has read is taken from L2 if it fits
    latency    steps that wait for each other x (slots of one warp, barriers and fences of a step)

What the machine code says of an iteration is a range (scripts/machine_code.py), and so is the time: every condition
met, or everything skipped that can be. It is a prediction: no measurement is in it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.op_calls import OpCall, OpCalls
from bench.rows import Row
from testing.cuda_costs import TABLE, Cost, read_table

from .floors import ASSUMED

CPP = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}


@dataclass(frozen=True)
class Launch:
    """The work of one launch, from the shapes of the call."""

    kernel: str  # how its name begins in the table
    units: float = 0.0  # matrix instructions of all warps, or 16-byte accesses where the hot loop has none of these
    trips: int = 1  # of the hot loop in the loop around it
    pieces: float = 1.0  # blocks with work
    exponentials: float = 0.0
    dram: float = 0.0  # bytes
    l2: float = 0.0
    steps: float = 0.0  # iterations of the outermost loop, one after the other
    step_trips: int = 1  # of its hot loop in one step
    cluster: bool = False  # its barriers are those of a cluster, with a GPU-wide fence


def up(a: int, b: int) -> int:
    return -(-a // b) * b


# --- what the ops launch ---------------------------------------------------------------------------------------------


def products(a: int, b: int, dim: int) -> float:
    """m16n8k16 instructions of a times b dot products, in tiles of 64 by 64."""
    return up(a, 64) * up(b, 64) * up(dim, 16) / (16 * 8 * 16)


def attention(rows: bool, columns: bool, query: Any, key: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    batch, heads, m, dim = query.shape
    n, group, kind, size = key.shape[2], heads // key.shape[1], CPP[query.dtype], query.element_size()
    reduction = options.get("query_reduction")
    if rows and columns and reduction == "last":
        m = 1
    kept = m if reduction == "none" else 1  # rows of the scores
    trips, pieces = -(-dim // 64), batch * heads * -(-m // 64) * -(-n // 64)
    floats = batch * heads * m * (1 + rows) + batch * kept * n * columns  # lse and entropy, scores
    unique = float(size * batch * dim * (heads * m + key.shape[1] * n) + 4 * floats)
    read = float(size * 64 * dim * (pieces + batch * heads * -(-m // 64)))  # every tile of keys for every tile of rows
    exps = float(batch * heads * m * n)
    if options.get("cosine"):
        yield Launch(f"attention_norms_kernel<{kind}", unique / 16, pieces=unique / 8192, dram=unique)
    seen = {"l2": read} if options.get("cosine") else {"dram": unique, "l2": read}
    if rows:
        thin, resident = m * group <= 16, dim * size <= 512
        yield Launch(
            f"attention_rows_{'thin' if thin else 'wide'}_kernel<{kind}, {'true' if resident else 'false'}>",
            batch * heads / group * (16 if thin else up(m * group, 64)) * up(n, 64) * up(dim, 16) / 2048,
            trips, pieces, exponentials=exps, **seen,
        )  # fmt: skip
        if n > 4096:  # more ranges of keys than meet in a cluster
            yield Launch("attention_rows_combine_kernel<")
        seen = {"l2": read}
    if columns:
        heads_op = {"sum": 0, "mean": 0, "max": 1, "none": 2}[options.get("head_reduction", "mean")]
        op = 3 if reduction == "none" else heads_op
        name = f"attention_columns_kernel<{kind}, (HeadOp){op}"
        yield Launch(name, batch * heads * products(m, n, dim), trips, pieces, exponentials=exps, **seen)
        if m > 64 and reduction != "none":
            yield Launch("attention_columns_combine_kernel<")


def similarity(features: Any, best: Any, mean: Any = None, *_: Any, **options: Any) -> Iterator[Launch]:
    """The rows to compare with are given for cosine_scores, listed for contrastive_scores, with a list for the mean."""
    batch, n, dim = features.shape
    kind, size = CPP[features.dtype], features.element_size()
    listed = best.shape[1] + (mean is not None)
    if isinstance(mean, torch.Tensor):
        yield Launch(f"unit_sum_kernel<{kind}", mean.shape[1] * dim * size / 512, pieces=-(-mean.shape[1] // 32))
        if mean.shape[1] > 128:
            yield Launch("combine_sums_kernel")
    split = max(1, min(8, 132 // max(1, batch * -(-n // 64))))  # blocks of a cluster that share the channels
    tiles = batch * -(-n // 64) * -(-listed // 64)
    name = "tile" if best.shape[1] > 8 else "warp"
    units = batch * (products(n, listed, dim) if name == "tile" else n * listed * dim * size / 512)
    yield Launch(f"{name}_similarity_kernel<{kind}", units, -(-dim // 64) // split, tiles * split,
                 dram=size * batch * dim * (n + listed), l2=tiles * 128 * dim * size)  # fmt: skip


def paired(a: Any, b: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    """Of two views of one video, a frame apart, the second reading of a frame comes from the L2."""
    batch, n, dim = a.shape
    moved = float(batch * n * dim * a.element_size())
    warps = max(w for w in (1, 2, 4, 8) if w == 1 or (batch * n * w / 2 < 16 * 132 and moved > batch * n * 1024 * w))
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    yield Launch(f"paired_cosine_kernel<{CPP[a.dtype]}, true", 2 * moved / 512, pieces=batch * n * warps / 8,
                 dram=moved + (moved / batch if same else moved), l2=2 * moved)  # fmt: skip


def repulsion(features: Any, k: int, positions: Any = None, *_: Any, **options: Any) -> Iterator[Launch]:
    batch, n, dim = features.shape
    kind, size, steps = CPP[features.dtype], features.element_size(), min(k, n)
    moved, first = float(batch * n * dim * size), options.get("first", "outlier")
    objective = ("Max", "Sum")[options.get("aggregate", "max") == "sum"] if options.get("potential") == "riesz" else ""
    if n <= 3072:
        tile = 128 if -(-n // 128) * (-(-n // 128) + 1) // 2 >= 264 else 64
        side = -(-n // tile)
        tiles = batch * side * (side + 1) // 2
        parts = min(8, max(1, 264 // tiles), max(1, dim // 128))  # blocks of a cluster that share the channels
        yield Launch(f"gram_kernel<{kind}, {tile}", tiles * tile * tile * up(dim, 16) / 2048, 1, tiles * parts,
                     dram=moved, l2=tiles * 2.0 * tile * dim * size)  # fmt: skip
        if objective or first != "index":
            yield Launch("gram_rows_kernel", batch * n * n / 128, pieces=batch * n / 8, l2=4.0 * batch * n * n)
        yield Launch("gram_greedy_kernel", steps=steps, pieces=batch)
        return
    yield Launch(f"prepare_kernel<{kind}", moved / 512, pieces=batch * n / 8, dram=moved)
    assert dim < 64, "of the kernels for more channels there is no row"
    assert first == "index", "of the kernels for another first pick there is no row"
    number = {"": 0, "Max": 1, "Sum": 2}[objective]  # of ObjectiveKind
    yield Launch(f"points_kernel<(ObjectiveKind){number}", steps=steps, pieces=8 * batch, cluster=True)


def dpp(features: Any, k: int, *_: Any, **options: Any) -> Iterator[Launch]:
    batch, n, _ = features.shape
    steps = min(k, n)
    assert n <= 3072, "of the kernels for more tokens there is no row"
    yield from itertools.islice(repulsion(features, k, first="index"), 1)
    # A warp takes 8 tokens of a block at once, and 4 of the terms of their sums.
    trips = -(-n // (64 * 24)) * steps // 8
    yield Launch("dpp_matrix_kernel", steps=steps, step_trips=trips, pieces=8 * batch, cluster=True)


def coverage(similarity: Any, k: int, *_: Any, **options: Any) -> Iterator[Launch]:
    """About 100 tokens are evaluated in a step, by 128 warps."""
    batch, rows, n = similarity.shape
    kind, size, steps = CPP[similarity.dtype], similarity.element_size(), min(k, n)
    yield Launch(f"coverage_columns_kernel<{kind}", batch * rows * n / 4096, pieces=batch * rows * n / 4096,
                 dram=float(batch * rows * n * size))  # fmt: skip
    yield Launch("coverage_greedy_kernel", steps=steps, step_trips=-(-rows // 128), pieces=8 * batch, cluster=True)


def nms(scores: Any, features: Any, positions: Any, k: int, *_: Any, **options: Any) -> Iterator[Launch]:
    batch, n, dim = features.shape
    kind, size = CPP[features.dtype], features.element_size()
    moved, k, near = batch * n * dim * size, min(k, n), 81  # tokens of a window
    yield Launch(f"nms_prepare_kernel<{kind}", moved / 512, pieces=batch * n / 4, dram=moved)
    tiles = -(-n // 64)
    if 4 * batch * n * n <= 16 << 20:
        pairs = batch * tiles * (tiles // 2 + 1)
        yield Launch(f"nms_weights_kernel<{kind}", pairs * products(64, 64, dim), -(-dim // 256), 4 * pairs,
                     l2=128.0 * pairs * dim * size)  # fmt: skip
    else:
        yield Launch(f"nms_lists_kernel<{kind}", batch * k * up(near, 64) / 8 * dim / 16, -(-dim // 16), batch * k,
                     l2=batch * k * near * dim * size)  # fmt: skip
    yield Launch(f"nms_select_kernel<{kind}", steps=k, pieces=batch)


def merging(
    values: Any, targets: Any, *_: Any, keys: Any = None, assignment: Any = None, **options: Any
) -> Iterator[Launch]:
    batch, n, width = values.shape
    kind, size, slots = CPP[values.dtype], values.element_size(), targets.shape[1]
    if assignment is None:
        of, dim = values if keys is None else keys, (values if keys is None else keys).shape[2]
        moved, tiles = float(batch * n * dim * of.element_size()), batch * -(-n // 64)
        parts = max(1, min(8, 264 // tiles, dim // 128))  # blocks of a cluster that share the channels
        yield Launch(f"merge_norms_kernel<{CPP[of.dtype]}", moved / 512, pieces=batch * n / 4, dram=moved)
        yield Launch(f"merge_assign_kernel<{CPP[of.dtype]}", batch * products(n, slots, dim), -(-dim // 64),
                     tiles * parts, l2=moved * -(-slots // 64) * 2)  # fmt: skip
    else:
        yield Launch("copy_assignment_kernel", pieces=batch * n / 128)
    yield Launch(f"merge_means_kernel<{kind}", batch * n * width * size / 512, pieces=batch * slots,
                 dram=float(batch * (n + slots) * width * size), l2=8.0 * batch * slots * n)  # fmt: skip


def density(features: Any, k: int, *_: Any, **options: Any) -> Iterator[Launch]:
    batch, n, dim = features.shape
    kind, size, side = CPP[features.dtype], features.element_size(), -(-n // 64)
    tiles = batch * side * (side + 1) // 2
    parts = max(1, min(8, 264 // tiles, dim // 128))  # blocks of a cluster that share the channels
    yield Launch(f"density_products_kernel<{kind}", tiles * products(64, 64, dim), -(-dim // 64), tiles * parts,
                 dram=float(batch * n * dim * size), l2=tiles * 128.0 * dim * size)  # fmt: skip
    yield Launch(f"density_means_kernel<{kind}", pieces=batch * n / 16, steps=4, step_trips=-(-n // 512),
                 l2=16.0 * batch * n * n)  # fmt: skip
    yield Launch(f"density_distances_kernel<{kind}", batch * n * n / 128, pieces=batch * n / 4, l2=4.0 * batch * n * n)
    yield from radix("select_kernel<float", features[:, :, 0])


def compaction(tensors: Any, indices: Any, dims: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    part = sum(t.numel() * t.element_size() / t.shape[dim] for t, dim in zip(tensors, dims, strict=True))
    yield Launch("gather_compact_kernel", dram=2.0 * part * indices.shape[-1])


def radix(kernel: str, scores: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    """Four passes over keys of 8 bits each, by blocks of 512 threads, a cluster of up to 8 of them."""
    n = scores.shape[-1]
    yield Launch(kernel, steps=4, step_trips=-(-n // (4 * 512 * min(8, -(-n // 2048)))), dram=4.0 * scores.numel())


def grouped(scores: Any, groups: Any, budgets: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    """As many passes as tell the tokens of a group apart: the bits of their number, and 8 for uneven scores."""
    (batch, n), count = scores.shape, budgets.shape[1]
    digit = max(3, min(8, 14 - (count - 1).bit_length()))
    cluster = next((c for c in (1, 2, 4) if n <= 8192 * c), 8)
    passes = -(-(8 + (n // count).bit_length()) // digit)
    name = f"select_grouped_kernel<{CPP[scores.dtype]}, (GroupedMemory)0"
    yield Launch(name, steps=passes, step_trips=-(-n // (4 * 512 * cluster)), cluster=cluster > 1,
                 dram=float(n * batch * (scores.element_size() + 8) + 8 * batch * count))  # fmt: skip


def once(kernel: str, values: Any, *_: Any, **options: Any) -> Iterator[Launch]:
    """One pass of a block over a sample."""
    yield Launch(kernel, steps=-(-values.shape[-1] // (4 * 512)), dram=float(values.numel() * values.element_size()))


OPS: dict[str, Any] = {
    "attention_entropy": lambda *a, **o: attention(True, False, *a, **o),
    "attention_scores": lambda *a, **o: attention(False, True, *a, **o),
    "cross_attention_scores": lambda *a, **o: attention(True, True, *a, **o),
    "cosine_scores": lambda features, queries, *a, **o: similarity(features, queries),
    "contrastive_scores": similarity,
    "paired_cosine": paired,
    "merge_tokens": merging,
    "density_peaks": density,
    "repulsion_sample": repulsion,
    "dpp_sample": dpp,
    "coverage_sample": coverage,
    "spatial_semantic_nms": nms,
    "select_topk": lambda scores, *a, **o: radix(f"select_kernel<{CPP[scores.dtype]}, false", scores),
    "select_grouped_topk": grouped,
    "select_two_tailed": lambda scores, *a, **o: radix(f"select_kernel<{CPP[scores.dtype]}, true", scores),
    "select_mixture": lambda text, *a, **o: radix("mixture_kernel", text),
    "mask_to_indices": lambda mask, *a, **o: once("mask_kernel", mask),
    "gather_compact": compaction,
    "score_entropy": lambda scores, *a, **o: once(f"score_entropy_kernel<{CPP[scores.dtype]}", scores),
}


# --- what a launch takes ---------------------------------------------------------------------------------------------


def limit_seconds(launch: Launch, cost: Cost, least: bool = False) -> dict[str, float]:
    """Every limit of one launch, at most or at least, without the launch itself."""
    sms, clock = ASSUMED["multiprocessors"], ASSUMED["clock"]
    # The last round of blocks leaves multiprocessors idle.
    share = -(-launch.pieces // sms) / max(launch.pieces, 1)
    slots = launch.units * cost.per_unit(launch.trips, least)
    matrix = launch.units if cost.matrix else 0.0
    nest, hot = (cost.nest_least, cost.least) if least else (cost.nest, cost.slots)
    step = (nest + (launch.step_trips - 1) * hot) * ASSUMED["cycles of a lone warp"]
    step += cost.barriers * ASSUMED["cycles of a barrier"]
    step += cost.fences * ASSUMED["cycles of a fence"] if launch.cluster else 0
    return {
        "issue": slots * share / (ASSUMED["slots"] * clock),
        "tensor": matrix * share * ASSUMED["cycles of a matrix instruction"] / (4 * clock),
        "MUFU": launch.exponentials * share / (ASSUMED["special"] * clock),
        "DRAM": launch.dram / ASSUMED["bandwidth"],
        "L2": launch.l2 / ASSUMED["L2"],
        "latency": launch.steps * step / clock,
    }


def predicted(calls: list[OpCall], least: bool = False) -> dict[str, float]:
    """Seconds that the calls of a row take at most, or at least, by the limit that binds; `launch` is starting them."""
    _, table = read_table(TABLE.read_text())
    parts = {"launch": 0.0}
    launches = [launch for op, args, kwargs in calls for launch in OPS[op](*args, **kwargs)]
    for number, launch in enumerate(launches):
        cost = next((c for kernel, c in table.items() if kernel.name.startswith(launch.kernel)), None)
        assert cost is not None, f"model.py knows a kernel {launch.kernel} that {TABLE.name} has not"
        limits = limit_seconds(launch, cost, least)
        binds = max(limits, key=lambda name: limits[name])
        parts[binds] = parts.get(binds, 0.0) + limits[binds]
        parts["launch"] += ASSUMED["next launch" if number else "launch"]
    return parts


def calls_of(row: Row) -> list[OpCall]:
    """The ops that a row calls, with their arguments as tensors without data."""
    with FakeTensorMode():
        inputs = row.make(torch.device("cpu"), 0)
        with OpCalls() as seen:
            row.ours(inputs)
    return seen.found
