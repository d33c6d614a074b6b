"""Loads the installed wheel in whatever torch is here and runs every op once against its reference.

Run by scripts/check_abi.py in an environment of its own; prints one line and exits with 1 when something differs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import tokenprune_kernels as tp
from tokenprune_kernels._op import OPS, public_ops

B, N, M, HEADS, KV_HEADS, D, C, K = 2, 37, 3, 4, 2, 16, 24, 9


def cases() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of one call of every op, with optional tensors, keywords and padding among them."""
    torch.manual_seed(0)
    query, key = torch.randn(B, HEADS, M, D), torch.randn(B, KV_HEADS, N, D)
    lse = torch.randn(B, HEADS, M) + 6
    scores, features = torch.rand(B, N), torch.randn(B, N, C)
    mask = torch.rand(B, N) > 0.2
    positions = torch.stack([torch.arange(N) // 6, torch.arange(N) % 6], -1).float().expand(B, N, 2)
    indices = torch.tensor([[0, 4, 9, -1], [1, 2, 3, 36]])
    return {
        "cross_attention_scores": ((query, key), {"key_mask": mask, "query_reduction": "max+last", "causal": True}),
        "attention_entropy": ((query, key), {"cosine": True, "scale": 3.0}),
        "attention_scores": ((query, key, lse), {"key_indices": indices, "head_reduction": "max"}),
        "score_entropy": ((scores,), {"mask": mask}),
        "cosine_scores": ((features, torch.randn(B, M, C)), {"reduction": "mean"}),
        "paired_cosine": ((features[:, 1:], features[:, :-1]), {}),
        "contrastive_scores": ((features, indices, indices.flip(0)), {}),
        "select_topk": ((scores, K), {"mask": mask, "largest": False}),
        "select_grouped_topk": ((scores, torch.randint(-1, 4, (B, N)), torch.tensor([[2, 0, 5], [1, 9, -1]]), K), {}),
        "select_two_tailed": ((scores, torch.tensor([2, 20]), K), {}),
        "select_mixture": ((scores, torch.rand(B, N), K), {"floor": 0.25}),
        "mask_to_indices": ((mask, K), {}),
        "repulsion_sample": ((features, K), {"positions": positions, "potential": "riesz", "aggregate": "sum"}),
        "spatial_semantic_nms": ((scores, features, positions, K), {"sigma_semantic": 0.5, "mask": mask}),
        "density_peaks": ((features, K), {"neighbors": 3, "mask": mask}),
        "merge_tokens": ((features, indices), {"weights": scores, "mask": mask, "threshold": 0.1}),
        "dpp_sample": ((features, K), {"quality": scores, "mask": mask}),
        "coverage_sample": ((features, K), {"row_weights": scores, "mask": torch.rand(B, C) > 0.2}),
        "gather_compact": (([features, mask], indices), {"dims": [1, 1]}),
    }


def main() -> int:
    reason = tp.config()["backends"]["cpu"]
    if reason is not None:
        print(f"torch {torch.__version__}: {reason}")
        return 1
    calls = cases()
    missing = {name for name in public_ops() if "cpu" in OPS[name].backends} - set(calls)
    if missing:
        print(f"no case for {', '.join(sorted(missing))}")
        return 1
    for name, (args, kwargs) in calls.items():
        got = tree_leaves(getattr(tp, name)(*args, **kwargs, backend="cpu"))
        want = tree_leaves(getattr(tp.reference, name)(*args, **kwargs))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
        torch.library.opcheck(getattr(torch.ops.tokenprune, name).default, args, kwargs)
    try:
        torch.ops.tokenprune.select_topk(torch.rand(3), 1)
    except RuntimeError as error:
        if "select_topk" not in str(error):
            raise
    else:
        print("a wrong shape was accepted")
        return 1
    info = tp.config()["compiled library"]
    print(
        f"torch {torch.__version__}, Python {sys.version.split()[0]}: {len(calls)} ops equal their references and pass"
        f" opcheck, {info['cpu_capability']}, CUDA kernels for {info.get('cuda_architectures') or 'nothing'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
