"""The calls whose launches are compiled: per op a base call of a real model, and one option changed at a time.

Tensors are on the meta device: shapes, strides and dtypes without memory. What costs a compilation is a change of
dtype, of an option, of a configuration, or of which sizes and strides are multiples of 16; 576 tokens or 2880 are often
one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BRAIN, SINGLE)
NAMES = {HALF: "fp16", BRAIN: "bf16", SINGLE: "fp32"}


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flags(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.bool)


def integers(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


# --- attention ------------------------------------------------------------------------------------------------------


def heads(
    dim: int = 128,
    rows: int = 64,
    keys: int = 576,
    query: int = 32,
    kv: int = 32,
    dtype: torch.dtype = HALF,
    batch: int = 2,
) -> dict[str, Tensor]:
    return {"query": meta(batch, query, rows, dim, dtype=dtype), "key": meta(batch, kv, keys, dim, dtype=dtype)}


def strided_heads(dtype: torch.dtype = HALF) -> dict[str, Tensor]:
    """[B, M, H, D] storage, an odd number of tokens before the visual ones, and odd strides between heads."""
    query = meta(2, 13, 28, 132, dtype=dtype).transpose(1, 2)[..., :128]
    return {"query": query, "key": meta(2, 613, 4, 132, dtype=dtype).transpose(1, 2)[:, :, 35:, :128]}


LLAVA = heads()
QWEN = {"query": 28, "kv": 4}
VISIBLE = {"key_mask": flags(2, 576), "query_positions": integers(2, 64), "causal": True}
LISTED = {"key_indices": integers(2, 500), "query_mask": flags(2, 64)}


def attended() -> Iterator[Call]:
    """What the three attention ops have in common."""
    for dim in (64, 72, 80, 96, 128, 256, 1024, 4096, 8192):
        many = {"query": 1, "kv": 1} if dim > 256 else {}
        yield Call(f"fp16 D {dim}", heads(dim, **many))
    for dtype, dims in ((BRAIN, (128,)), (SINGLE, (72, 128, 256, 4096))):
        for dim in dims:
            many = {"query": 1, "kv": 1} if dim > 256 else {}
            yield Call(f"{NAMES[dtype]} D {dim}", heads(dim, dtype=dtype, **many))
    yield Call("odd sizes", heads(33, 5, 37, 4, 2))
    yield Call("odd strides", strided_heads())
    for keys in (4096, 16384):
        yield Call(f"Qwen2.5-VL, {keys} keys", heads(keys=keys, **QWEN))
    for rows in (1, 16, 4096):
        yield Call(f"{rows} rows", heads(rows=rows))
    yield Call("few heads", heads(rows=4096, query=4, kv=2))
    yield Call("one row, Qwen2.5-VL, fp32", heads(rows=1, keys=16384, dtype=SINGLE, **QWEN))
    yield Call("one row, causal", {**heads(rows=1, **QWEN), "causal": True})
    yield Call("causal", {**LLAVA, "causal": True})
    yield Call("key_mask", {**LLAVA, "key_mask": VISIBLE["key_mask"]})
    yield Call("positions", {**LLAVA, "query_positions": VISIBLE["query_positions"], "causal": True})
    yield Call("cosine", {**LLAVA, "cosine": True})
    yield Call("cosine fp32", {**heads(dtype=SINGLE), "cosine": True, "scale": 2.0})
    yield Call("cosine, embeddings", {**heads(4096, 64, 576, 1, 1), "cosine": True, "scale": 100.0})


def reduced() -> Iterator[Call]:
    """The two ops that return scores."""
    yield from attended()
    yield Call("key_indices", {**LLAVA, "key_indices": LISTED["key_indices"]})
    yield Call("query_mask", {**LLAVA, "query_mask": LISTED["query_mask"]})
    for head in ("sum", "max", "none"):
        yield Call(f"heads {head}", {**LLAVA, "head_reduction": head})
    for rows in ("sum", "max", "last", "mean+sum+max+last", "none"):
        yield Call(f"rows {rows}", {**LLAVA, "query_reduction": rows})
    everything = {**VISIBLE, **LISTED, "query_reduction": "mean+max+last", "head_reduction": "max"}
    for dtype in (HALF, SINGLE):
        yield Call(f"everything {NAMES[dtype]}", {**heads(dtype=dtype), **everything})
    yield Call("everything, one row", {
        **heads(rows=1), "key_mask": flags(2, 576), "query_positions": integers(2, 1), "causal": True,
        "key_indices": integers(2, 500), "query_mask": flags(2, 1), "query_reduction": "last", "head_reduction": "none",
    })  # fmt: skip


def with_lse(calls: Iterator[Call]) -> Iterator[Call]:
    for call in calls:
        rows = call.arguments["query"].shape[:3]
        yield Call(call.name, {**call.arguments, "lse": meta(*rows, dtype=SINGLE)})


# --- similarity -----------------------------------------------------------------------------------------------------


def cosines() -> Iterator[Call]:
    for dtype in DTYPES:
        for channels in (1024, 4096):
            tensors = {"features": meta(2, 576, channels, dtype=dtype), "queries": meta(2, 64, channels, dtype=dtype)}
            yield Call(f"{NAMES[dtype]} C {channels}", tensors)
    for tokens, rows, channels in ((576, 1, 4096), (2880, 4096, 1024), (16384, 64, 8192), (37, 5, 71), (576, 16, 256)):
        tensors = {"features": meta(2, tokens, channels), "queries": meta(2, rows, channels)}
        yield Call(f"{tokens} tokens, {rows} queries of {channels}", tensors)
    single = {"features": meta(2, 37, 71, dtype=SINGLE), "queries": meta(2, 5, 71, dtype=SINGLE)}
    yield Call("odd sizes fp32", single)
    base = {"features": meta(2, 576, 4096), "queries": meta(2, 64, 4096)}
    yield Call("mean", {**base, "reduction": "mean"})
    for reduction in ("max", "mean"):
        yield Call(f"{reduction}, mask", {**base, "query_mask": flags(2, 64), "reduction": reduction})
    yield Call("strided", {"features": meta(2, 577, 4100)[:, 1:, :4096], "queries": base["queries"]})


def contrasts() -> Iterator[Call]:
    for dtype in DTYPES:
        for channels in (1024, 4096):
            yield Call(f"{NAMES[dtype]} C {channels}", _contrast(2, 576, channels, 153, 57, dtype))
    for tokens, anchors, references, channels in ((2880, 500, 288, 8192), (16384, 8, 1, 1024), (37, 3, 5, 71)):
        yield Call(f"{tokens} tokens of {channels}", _contrast(2, tokens, channels, anchors, references))
    yield Call("odd sizes fp32", _contrast(2, 37, 71, 3, 5, SINGLE))


def pairs() -> Iterator[Call]:
    for dtype in DTYPES:
        video = meta(32, 196, 3584, dtype=dtype)
        yield Call(NAMES[dtype], {"a": video[1:], "b": video[:-1]})
        yield Call(f"{NAMES[dtype]}, odd sizes", {"a": meta(2, 37, 71, dtype=dtype), "b": meta(2, 37, 71, dtype=dtype)})
    for channels in (64, 256):
        yield Call(f"C {channels}", {"a": meta(2, 37, channels), "b": meta(2, 37, channels)})


def _contrast(
    batch: int, tokens: int, channels: int, anchors: int, references: int, dtype: torch.dtype = HALF
) -> dict[str, Tensor]:
    return {
        "features": meta(batch, tokens, channels, dtype=dtype),
        "anchor_indices": integers(batch, anchors),
        "reference_indices": integers(batch, references),
    }


# --- selection ------------------------------------------------------------------------------------------------------

LENGTHS = (37, 576, 2880, 16384, 100_000)
MASKED = (576, 16384)


def entropies() -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(NAMES[dtype], {"scores": meta(2, 576, dtype=dtype)})
    for tokens in LENGTHS:
        yield Call(f"{tokens} tokens", {"scores": meta(2, tokens, dtype=SINGLE)})
    yield Call("mask, not normalized", {"scores": meta(2, 576), "mask": flags(2, 576), "normalized": False})


def topk() -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(NAMES[dtype], {"scores": meta(2, 576, dtype=dtype), "k": 192})
    for tokens in LENGTHS:
        for k in (64, tokens // 2):
            yield Call(f"{k} of {tokens} tokens", {"scores": meta(2, tokens, dtype=SINGLE), "k": k})
    for tokens in MASKED:
        call = {"scores": meta(2, tokens, dtype=SINGLE), "k": 64, "mask": flags(2, tokens), "largest": False}
        yield Call(f"smallest of {tokens} tokens, mask", call)


def two_tailed() -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(NAMES[dtype], {"scores": meta(2, 576, dtype=dtype), "num_low": integers(2), "k": 192})
    for tokens in LENGTHS:
        yield Call(f"{tokens} tokens", {"scores": meta(2, tokens, dtype=SINGLE), "num_low": integers(2), "k": 64})
    for tokens in MASKED:
        call = {"scores": meta(2, tokens, dtype=SINGLE), "num_low": integers(2), "k": 64, "mask": flags(2, tokens)}
        yield Call(f"{tokens} tokens, mask", call)


def mixtures() -> Iterator[Call]:
    for dtype in DTYPES:
        scores = meta(2, 576, dtype=dtype)
        yield Call(NAMES[dtype], {"text_scores": scores, "visual_scores": scores, "k": 192})
    for tokens in LENGTHS:
        scores = meta(2, tokens, dtype=SINGLE)
        for k in (64, tokens // 2):
            yield Call(f"{k} of {tokens} tokens", {"text_scores": scores, "visual_scores": scores, "k": k})
    for tokens in MASKED:
        scores = meta(2, tokens, dtype=SINGLE)
        call = {"text_scores": scores, "visual_scores": scores, "k": 64, "mask": flags(2, tokens)}
        yield Call(f"{tokens} tokens, mask", call)
    yield Call("no floor", {"text_scores": meta(2, 576), "visual_scores": meta(2, 576), "k": 64, "floor": 0.0})


def positions_of_true() -> Iterator[Call]:
    for tokens in LENGTHS:
        yield Call(f"{tokens} tokens", {"mask": flags(2, tokens), "capacity": 192})
    yield Call("strided", {"mask": flags(2, 601)[:, 25:], "capacity": 577})


def grouped() -> Iterator[Call]:
    for dtype in DTYPES:
        scores = meta(2, 6272, dtype=dtype)
        yield Call(NAMES[dtype], {"scores": scores, "groups": integers(2, 6272), "budgets": integers(2, 32), "k": 512})
    for tokens in LENGTHS:
        call = {"scores": meta(2, tokens, dtype=SINGLE), "groups": integers(2, tokens), "budgets": integers(2, 5)}
        yield Call(f"{tokens} tokens", {**call, "k": 64})
        yield Call(f"smallest of {tokens} tokens, mask", {**call, "k": 64, "mask": flags(2, tokens), "largest": False})
    strays = {"scores": meta(2, 576), "groups": integers(2, 576), "budgets": integers(2, 0), "k": 64}
    yield Call("no groups", strays)


# --- greedy ---------------------------------------------------------------------------------------------------------


def repulsions() -> Iterator[Call]:
    for dtype in DTYPES:
        for tokens, channels in ((576, 1024), (2880, 4096), (16384, 1024)):
            call = {"features": meta(1, tokens, channels, dtype=dtype), "k": 64}
            yield Call(f"{NAMES[dtype]}, {tokens} tokens of {channels}", call)
    for batch, tokens, channels in ((64, 576, 1024), (1, 576, 8192), (2, 37, 71), (1, 8192, 3584), (1, 200, 256)):
        call = {"features": meta(batch, tokens, channels), "k": 64}
        yield Call(f"{batch} samples, {tokens} tokens of {channels}", call)
    yield Call("odd sizes fp32", {"features": meta(2, 37, 71, dtype=SINGLE), "k": 9})
    for tokens in (576, 16384):
        yield from _repulsion_options(tokens)
    yield from _repulsion_everything(2880)


def _repulsion_options(tokens: int) -> Iterator[Call]:
    base = {"features": meta(1, tokens, 1024), "k": 64}
    grid = meta(1, tokens, 2, dtype=SINGLE)
    yield Call(f"{tokens}: isolated", {**base, "first": "isolated"})
    yield Call(f"{tokens}: index", {**base, "first": "index"})
    yield Call(f"{tokens}: energy, mask", {**base, "energy": meta(1, tokens, dtype=SINGLE), "mask": flags(1, tokens)})
    for potential, aggregate in (("riesz", "max"), ("riesz", "sum"), ("gaussian", "max")):
        call = {**base, "positions": grid, "potential": potential, "aggregate": aggregate}
        yield Call(f"{tokens}: {potential} {aggregate}", call)
    yield Call(f"{tokens}: cosine sum", {**base, "aggregate": "sum"})
    yield Call(f"{tokens}: seeds", {**base, "seed_indices": integers(1, 20)})
    yield from _repulsion_everything(tokens)


def _repulsion_everything(tokens: int) -> Iterator[Call]:
    grid = meta(1, tokens, 2, dtype=SINGLE)
    masked = {"features": meta(1, tokens, 1024), "k": 64, "mask": flags(1, tokens)}
    yield Call(f"{tokens}: isolated, mask", {**masked, "first": "isolated"})
    yield Call(f"{tokens}: seeds, fp32, everything", {
        "features": meta(1, tokens, 1024, dtype=SINGLE), "k": 64, "seed_indices": integers(1, 20), "positions": grid,
        "energy": meta(1, tokens, dtype=SINGLE), "mask": flags(1, tokens), "potential": "riesz", "aggregate": "sum",
    })  # fmt: skip


def suppressions() -> Iterator[Call]:
    for dtype in DTYPES:
        for tokens, channels in ((576, 1024), (2880, 4096), (16384, 1024)):
            yield Call(f"{NAMES[dtype]}, {tokens} tokens of {channels}", _suppression(tokens, channels, dtype))
    for tokens, channels in ((37, 71), (1152, 8192), (200, 256)):
        yield Call(f"{tokens} tokens of {channels}", _suppression(tokens, channels))
    yield Call("odd sizes fp32", _suppression(37, 71, SINGLE))
    for tokens in (576, 16384):
        base = _suppression(tokens, 1024)
        yield Call(f"{tokens}: hard", {**base, "mode": "hard"})
        yield Call(f"{tokens}: groups", {**base, "groups": integers(1, tokens)})
        yield Call(f"{tokens}: mask", {**base, "mask": flags(1, tokens)})
        yield Call(f"{tokens}: infinite", {
            **base, "radius": float("inf"), "sigma_spatial": float("inf"), "sigma_semantic": float("inf")
        })  # fmt: skip
        everything = {"groups": integers(1, tokens), "mask": flags(1, tokens), "mode": "hard"}
        yield Call(f"{tokens}: everything, fp32", {**_suppression(tokens, 1024, SINGLE), **everything})
    yield Call("64 samples", _suppression(576, 1024, batch=64))


def _suppression(tokens: int, channels: int, dtype: torch.dtype = HALF, batch: int = 1) -> dict[str, Any]:
    return {
        "scores": meta(batch, tokens, dtype=dtype),
        "features": meta(batch, tokens, channels, dtype=dtype),
        "positions": meta(batch, tokens, 2, dtype=dtype),
        "k": 64,
    }


def determinants() -> Iterator[Call]:
    for dtype in DTYPES:
        for tokens, channels in ((576, 1024), (2880, 4096)):
            call = {"features": meta(1, tokens, channels, dtype=dtype), "k": 64}
            yield Call(f"{NAMES[dtype]}, {tokens} tokens of {channels}", call)
        full = {"features": meta(2, 37, 71, dtype=dtype), "quality": meta(2, 37, dtype=dtype), "mask": flags(2, 37)}
        yield Call(f"{NAMES[dtype]}, odd sizes, everything", {**full, "k": 9})
    for tokens in (100, 16384):
        full = {"features": meta(1, tokens, 1024), "quality": meta(1, tokens, dtype=SINGLE), "mask": flags(1, tokens)}
        yield Call(f"{tokens} tokens, everything", {**full, "k": 64})
    yield Call("64 samples", {"features": meta(64, 576, 1024), "k": 64})


def coverages() -> Iterator[Call]:
    for dtype in DTYPES:
        for tokens in (37, 576, 2880, 16384):
            base = {"similarity": meta(1, min(tokens, 2880), tokens, dtype=dtype), "k": 64}
            yield Call(f"{NAMES[dtype]}, {tokens} tokens", base)
        full = {"similarity": meta(2, 600, 576, dtype=dtype), "row_weights": meta(2, 600, dtype=dtype), "k": 64}
        more = {"quality": meta(2, 576, dtype=dtype), "row_mask": flags(2, 600), "mask": flags(2, 576)}
        yield Call(f"{NAMES[dtype]}, everything", {**full, **more})


def peaks() -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(NAMES[dtype], {"features": meta(1, 576, 4096, dtype=dtype), "k": 64})
        odd = {"features": meta(2, 37, 71, dtype=dtype), "mask": flags(2, 37), "k": 9}
        yield Call(f"{NAMES[dtype]}, odd sizes, mask", odd)
    for tokens in (2880, 6272):
        yield Call(f"{tokens} tokens", {"features": meta(1, tokens, 1024), "k": 64})


# --- compaction -----------------------------------------------------------------------------------------------------


def compactions() -> Iterator[Call]:
    cache = [meta(1, 32, 640, 128) for _ in range(64)]
    hidden, rope = meta(1, 640, 4096), integers(3, 1, 640)
    yield Call("LLaVA's cache", {"tensors": cache, "indices": integers(1, 192), "dims": [2] * 64})
    yield Call("LLaVA's cache, mixed dtypes", {
        "tensors": [*cache, hidden, rope, flags(1, 640), meta(1, 640, 1024, dtype=SINGLE)],
        "indices": integers(1, 192), "dims": [2] * 64 + [1, 2, 1, 1], "batch_dims": [0] * 65 + [1, 0, 0],
    })  # fmt: skip
    for dtype in (HALF, BRAIN, SINGLE, torch.int64, torch.bool, torch.complex128):
        tensors = [meta(2, 576, 1024, dtype=dtype)]
        yield Call(str(dtype).removeprefix("torch."), {"tensors": tensors, "indices": integers(2, 192), "dims": [1]})
    yield Call(
        "odd sizes", {"tensors": [meta(2, 37, 71), meta(2, 4, 37, 33)], "indices": integers(2, 9), "dims": [1, 2]}
    )
    unaligned = meta(2, 577, 1025)[:, 1:, 1:]
    yield Call("unaligned", {"tensors": [unaligned], "indices": integers(2, 192), "dims": [1]})
    yield Call("tokens last", {"tensors": [meta(2, 1024, 576)], "indices": integers(2, 192), "dims": [-1]})


def merges() -> Iterator[Call]:
    for metric in ("cosine", "euclidean"):
        for dtype in DTYPES:
            base = {"values": meta(2, 576, 1024, dtype=dtype), "targets": integers(2, 64), "metric": metric}
            yield Call(f"{NAMES[dtype]} {metric}", base)
            weighted = {"weights": meta(2, 576, dtype=dtype), "mask": flags(2, 576), "include_targets": False}
            yield Call(f"{NAMES[dtype]} {metric}, everything", {**base, **weighted, "threshold": 0.5})
        for tokens, channels, targets in ((37, 71, 5), (2880, 4096, 320), (16384, 64, 1024), (6272, 1152, 16)):
            call = {"values": meta(2, tokens, channels), "targets": integers(2, targets), "metric": metric}
            yield Call(f"{tokens} tokens of {channels}, {metric}", call)
    given = {"values": meta(2, 576, 1024), "targets": integers(2, 64), "assignment": integers(2, 576)}
    yield Call("assignment", given)
    keys = {"values": meta(2, 576, 4096), "targets": integers(2, 64), "keys": meta(2, 576, 64, dtype=SINGLE)}
    yield Call("keys", keys)


def inversions() -> Iterator[Call]:
    for kept, size in ((192, 576), (9, 37), (8192, 16384)):
        yield Call(f"{kept} of {size}", {"indices": integers(2, kept), "size": size})


SHAPES: dict[str, list[Call]] = {
    "cross_attention_scores": list(reduced()),
    "attention_entropy": list(attended()),
    "attention_scores": list(with_lse(reduced())),
    "score_entropy": list(entropies()),
    "cosine_scores": list(cosines()),
    "contrastive_scores": list(contrasts()),
    "paired_cosine": list(pairs()),
    "select_topk": list(topk()),
    "select_grouped_topk": list(grouped()),
    "select_two_tailed": list(two_tailed()),
    "select_mixture": list(mixtures()),
    "mask_to_indices": list(positions_of_true()),
    "repulsion_sample": list(repulsions()),
    "spatial_semantic_nms": list(suppressions()),
    "dpp_sample": list(determinants()),
    "coverage_sample": list(coverages()),
    "density_peaks": list(peaks()),
    "gather_compact": list(compactions()),
    "merge_tokens": list(merges()),
    "_invert_indices": list(inversions()),
}
