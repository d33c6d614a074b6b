"""Fill the generated tables of README.md: which op runs where (by running it), and the measured ratios.

usage: python scripts/update_readme.py [--check]

The ratios come from bench/results/cpu.json, which `make bench` writes; the support
table calls every op on every backend and dtype of this machine through the samples of tests/op_samples.py.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from op_samples import OPS, make, run  # noqa: E402

import tokenprune_kernels as tp  # noqa: E402
from bench.report import Row, duration  # noqa: E402

FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BACKENDS = ("cpu", "cuda", "triton", "reference")


def runs_on(op: str, backend: str, dtype: torch.dtype) -> bool:
    try:
        run(make(op, dtype=dtype), backend)
    except tp.BackendUnavailableError:
        return False
    return True


def support_table() -> str:
    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for op in OPS:
        cells = []
        for backend in BACKENDS:
            if tp.config()["backends"][backend] is not None:
                cells.append("")
                continue
            names = [name for name, dtype in FLOATS.items() if runs_on(op, backend, dtype)]
            special = {"mask_to_indices": "bool", "gather_compact": "every dtype"}
            cells.append(special.get(op, " ".join(names)) if len(names) == len(FLOATS) else " ".join(names))
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_table(results: dict[str, Any]) -> str:
    shown = [Row(**r) for r in results["rows"]]
    shown = [r for r in shown if r.target is not None]
    lines = ["| op, shape | ours | baseline | baseline / ours |", "|---|---|---|---|"]
    lines += [f"| {r.case} | {duration(r.ours)} | {r.baseline} | **{r.ratio:.1f}x** |" for r in shown]
    where = f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}, commit {results['commit']}"
    lines += ["", f"`{results['command']}` on {where}; best of interleaved rounds, results checked for equality first."]
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no section {name}")
    return pattern.sub(lambda m: m.group(1) + content + "\n" + m.group(2), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README.md is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = fill(old, "support", support_table())
    results = ROOT / "bench" / "results" / "cpu.json"
    new = fill(new, "bench", bench_table(json.loads(results.read_text())))
    if not arguments.check:
        readme.write_text(new)
    elif old != new:
        raise SystemExit("README.md is out of date: run python scripts/update_readme.py")


if __name__ == "__main__":
    main()
