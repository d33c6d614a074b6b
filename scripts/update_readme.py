"""Fill the generated tables of README.md and docs: which op runs where (by running it), and the ratios.

usage: python -m scripts.update_readme [--check]

The ratios come from cpu.json and prefill.json of bench/results, which `make bench` and `make bench-prefill` write, the
accuracy from studies/results/retention.json; scripts/shown.py says which of them README has. The support table calls
every op on every backend and dtype of this machine through the samples of testing/op_samples.py.
"""

import argparse
import json
from typing import Any

import torch

# Before the others: they may import Triton, and its interpreter has to be on by then.
from testing.cases import BACKENDS, dtypes_of, interpreted, lacks

# isort: split
from bench.report import HEADER, Row, cells, duration
from scripts.shown import IN_TABLE, SHOWN_METHODS, SHOWN_OPS, measured, retained, retention_command
from testing import ROOT, family_table, method_tables, sharding_table
from testing.op_samples import OPS, make, run
from testing.pages import fill
from tokenprune_kernels.methods import get_method

FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Each column with the test backends that can fill it: the CUDA kernels run on a GPU or on the host emulator.
COLUMNS = {"cpu": ("cpu",), "cuda": ("gpu", "emulator"), "triton": ("triton",), "reference": ("reference",)}


def runs_on(op: str, backend: str, dtype: torch.dtype) -> bool:
    if dtype not in dtypes_of(backend) or lacks(backend, op):
        return False
    run(make(op, dtype=dtype), backend)
    return True


def support_cell(op: str, backend: str | None) -> str:
    if backend is None:
        return ""
    names = [name for name, dtype in FLOATS.items() if runs_on(op, backend, dtype)]
    special = {"mask_to_indices": "bool", "gather_compact": "every dtype"}
    return special.get(op, " ".join(names)) if names else ""


def support_table() -> str:
    serves = {column: next((b for b in names if b in BACKENDS), None) for column, names in COLUMNS.items()}
    how = {"cuda": "emulated" if serves["cuda"] == "emulator" else ""}
    how["triton"] = "interpreted" if interpreted(serves["triton"] or "") else ""
    heads = [f"{column} ({how[column]})" if how.get(column) else column for column in COLUMNS]
    lines = ["| op | " + " | ".join(heads) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for op in OPS:
        lines.append(f"| `{op}` | " + " | ".join(support_cell(op, serves[column]) for column in COLUMNS) + " |")
    return "\n".join(lines)


def where(results: dict[str, Any]) -> str:
    machine = f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}, commit {results['commit']}"
    return f"`{results['command']}` on {machine}; best of interleaved rounds, results checked for equality first."


def kept_by_function() -> dict[str, str]:
    """By function of a method: the share of the unpruned model's accuracy that is left at 22.2% of the tokens."""
    return {stage.name: f"{share:.1%}" for name, share in retained().items() for stage in get_method(name).stages}


def bench_table(results: dict[str, Any]) -> str:
    lines = ["| shape | ours | baseline | baseline / ours | accuracy kept at 22.2% |", "|---|---|---|---|---|"]
    rows = {(r["case"], r["baseline"]): Row(**r) for r in results["rows"]}
    kept = kept_by_function()
    for case, baseline, _ in (*SHOWN_OPS, *(shown for shown in SHOWN_METHODS if shown.name in IN_TABLE)):
        if (case, baseline) not in rows:  # a method that came after the last run
            continue
        row = rows[case, baseline]
        share = kept.get(case.split(",")[0], "")
        lines.append(f"| {case} | {duration(row.ours)} | {baseline} | **{row.ratio:.1f}x** | {share} |")
    notes = (
        where(results),
        "All rows: [docs/benchmarks.md](docs/benchmarks.md).",
        f"The last column: `{retention_command()}`, a small LLaVA on its test set "
        "([docs/retention.md](docs/retention.md)).",
    )
    return "\n".join([*lines, "", " ".join(notes)])


FIGURES = """\
![How many times as long the baseline takes](figures/ratios.svg)

![Times over the number of visual tokens](figures/scaling.svg)

The attention scores over 576 visual tokens have 32 key heads (LLaVA-1.5-7B), the others 4 (Qwen2.5-VL-7B)."""


def benchmarks_page(results: dict[str, Any]) -> str:
    lines = ["# Benchmarks", "", where(results), "", FIGURES, ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(cells(Row(**r))) + " |" for r in results["rows"]]
    return "\n".join(lines) + "\n"


def slower_table(measured: dict[str, Any]) -> str:
    """The rows that somebody else wins; floors compute less than we do, and empty ops nothing."""
    floors = {"QK^T alone", "matrix product alone", "copy of as many bytes", "limit"}
    rows = [Row(**r) for r in measured["rows"]]
    lost = [row for row in rows if row.ratio < 1 and row.baseline not in floors and "calls:" not in row.case]
    lines = ["| case | ours | baseline | baseline / ours | note |", "|---|---|---|---|---|"]
    for row in lost:
        case, ours, baseline, ratio, _, note = cells(row)
        lines.append(f"| {case} | {ours} | {baseline} | {ratio} | {note} |")
    return "\n".join([*lines, "", where(measured)])


def prefill_table(results: dict[str, Any]) -> str:
    lines = ["| prefill | pruned | unpruned / pruned | |", "|---|---|---|---|"]
    for r in results["rows"]:
        row = Row(**r)
        lines.append(f"| {row.case} | {duration(row.ours)} | **{row.ratio:.2f}x** | {row.note} |")
    return "\n".join([*lines, "", where(results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README.md is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    results = measured()
    new = fill(old, "bench", bench_table(results))
    page = ROOT / "docs" / "transformers.md"
    prefill = json.loads((ROOT / "bench" / "results" / "prefill.json").read_text())
    old_page = page.read_text()
    new_page = fill(old_page, "prefill", prefill_table(prefill))
    new_page = fill(fill(new_page, "where", method_tables.where_and_by_what()), "arguments", method_tables.arguments())
    new_page = fill(fill(new_page, "families", family_table.families()), "proofs", family_table.proofs())
    pages = {
        readme: (old, new),
        page: (old_page, new_page),
    }
    when_not = ROOT / "docs" / "when-not.md"
    pages[when_not] = when_not.read_text(), fill(when_not.read_text(), "slower", slower_table(results))
    support = ROOT / "docs" / "support.md"
    pages[support] = support.read_text(), fill(support.read_text(), "support", support_table())
    methods = ROOT / "docs" / "methods.md"
    filled = fill(methods.read_text(), "methods", method_tables.faithful_to())
    pages[methods] = methods.read_text(), fill(filled, "bibtex", method_tables.bibtex())
    distributed = ROOT / "docs" / "distributed.md"
    pages[distributed] = distributed.read_text(), fill(distributed.read_text(), "shardings", sharding_table.shardings())
    benchmarks = ROOT / "docs" / "benchmarks.md"
    pages[benchmarks] = benchmarks.read_text(), benchmarks_page(results)
    for file, (before, after) in pages.items():
        if arguments.check and before != after:
            raise SystemExit(f"{file.name} is out of date: run python -m scripts.update_readme")
        file.write_text(after)


if __name__ == "__main__":
    main()
