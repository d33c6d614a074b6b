"""The rows of bench/rows on a CPU: `make bench ARGS="-k nms"` takes those of a family or with a word in their names."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from .rows import Row, compiled, cpu_rows


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name + (", busy" if row.busy else "")) for row in cpu_rows()])
def test_row(race: Any, row: Row) -> None:
    others = dict(row.others)
    if row.compile is not None:
        reference = compiled(row.compile)
        others["torch.compile of the reference"] = lambda x: reference(x["query"], x["key"])

    def check(results: dict[str, Any]) -> None:
        assert row.agree is not None
        for name, result in results.items():
            if name not in ("ours", *row.unlike):
                row.agree(result, results["ours"])

    with torch.inference_mode():
        x = row.make(torch.device("cpu"), 0)
        functions = {name: partial(f, x) for name, f in {"ours": row.ours, **others}.items()}
        target = next(iter(row.targets.items()), None)
        race(row.name, functions, check=check, target=target, seconds=row.seconds, note=row.note, busy=row.busy)


@pytest.mark.parametrize("key_heads", [4, 28])
def test_peak_memory(benchmark: Any, key_heads: int) -> None:
    """Peak memory that one call adds at M = 2000, N = 16384, 28 heads, in a process of its own."""
    script = f"""
import torch, tokenprune_kernels as tp
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
query, key = torch.randn(1, 28, 2000, 8), torch.randn(1, {key_heads}, 16384, 8)
tp.cross_attention_scores(query[:, :, :100], key[:, :, :64])
before = peak()
tp.cross_attention_scores(query, key)
print(peak() - before)
"""

    def measure() -> int:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(done.stdout)

    extra = benchmark.pedantic(measure, rounds=1)
    matrix = 28 * 2000 * 16384 * 4
    benchmark.extra_info.update(peak_extra_bytes=extra, logits_bytes=matrix, share=extra / matrix)
    print(f"\nHkv = {key_heads}: {extra / 2**20:.1f} MiB, {100 * extra / matrix:.2f}% of the logits")
