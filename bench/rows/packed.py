"""Rows of packed batches: the calls of `varlen` on three images of different sizes, one behind the other."""

import itertools
from typing import Any

import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing.gpu_checks import Function, Inputs
from testing.gpu_device import on_backend

from . import Row, Scale, against, attention_like, normal, on

HALF = torch.float16


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def gpu_rows(scale: Scale) -> list[Row]:
    model = scale.model("LLaVA-1.5-7B")
    n, m, dim = model.tokens, model.question, model.head_dim
    keys, rows = [n, n // 2, 2 * n], [m, m // 2, m]
    longest = {"max_seqlen_q": max(rows), "max_seqlen_k": max(keys)}

    def make(device: torch.device, seed: int) -> Inputs:
        draw = torch.Generator().manual_seed(seed)
        return on(device, {
            "query": normal(seed, sum(rows), model.query_heads, dim, dtype=HALF),
            "key": normal(seed + 1000, sum(keys), model.key_heads, dim, dtype=HALF),
            "cu_seqlens_q": cu_seqlens(rows),
            "cu_seqlens_k": cu_seqlens(keys),
            "lse": normal(seed, model.query_heads, sum(rows)) + 6,
            "scores": attention_like(seed, 1, sum(keys))[0],
            "hidden": normal(seed + 2000, sum(keys), model.hidden, dtype=HALF),
            "indices": torch.randperm(sum(keys), generator=draw)[: 3 * model.keep].sort().values,
        })  # fmt: skip

    def attention(x: Inputs, *names: str) -> Any:
        return [x[name] for name in ("query", "key", *names, "cu_seqlens_q", "cu_seqlens_k")]

    def row(function: str, ops: tuple[str, ...], call: Function) -> Row:
        reference = on_backend(call, "reference")
        return Row(f"packed {function} N{'+'.join(map(str, keys))}", ops, make, call, against(reference, 2e-3),
                   {"reference": reference}, dtype=HALF)  # fmt: skip

    return [
        row("cross_attention_scores", ("cross_attention_scores", "gather_compact"),
            lambda x: tp.varlen.cross_attention_scores(*attention(x), **longest)),
        row("attention_scores", ("attention_scores", "gather_compact"),
            lambda x: tp.varlen.attention_scores(*attention(x, "lse"), **longest)),
        row("attention_entropy", ("attention_entropy", "gather_compact"),
            lambda x: tp.varlen.attention_entropy(*attention(x), **longest)),
        row("select_topk", ("select_grouped_topk",),
            lambda x: tp.varlen.select_topk(x["scores"], model.keep, x["cu_seqlens_k"])),
        row("gather_compact", ("gather_compact",),
            lambda x: tp.varlen.gather_compact([x["hidden"], x["key"]], x["indices"])),
    ]  # fmt: skip
