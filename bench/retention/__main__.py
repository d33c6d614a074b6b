"""`python -m bench.retention`: measure, write bench/results/retention.json, the figures and the tables of the page."""

import argparse
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.vqa.evaluate import Item, batches, by_family, items, load
from bench.vqa.questions import FAMILIES
from bench.vqa.words import VOCABULARY

from . import figures, page, results
from .measure import IN_MODEL, METHODS, UNPRUNED, Outcome, Run, measure, runs
from .timing import prefill_seconds

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-llava-vqa"
RESULTS = ROOT / "bench" / "results" / "retention.json"
PAGE = ROOT / "docs" / "retention.md"
SHOWN_KEEP = 64  # of the pictures of failures
OTHER_LAYER_KEEP = 128  # the budget at which the methods inside the model are tried at a second layer
PER_METHOD = 4


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return re.sub(r"\s+\d+-Core Processor", "", line.split(":")[1].strip())
    return platform.processor() or platform.machine()


def _failures(asked: list[Item], outcomes: dict[Run, Outcome], keep: int) -> list[tuple[Run, int]]:
    """For every method, questions of different families that only the unpruned model answers correctly."""
    chosen = []
    for method in METHODS:
        run = next((r for r in outcomes if r.method == method and r.keep == keep and r.layer is None), None)
        if run is None:
            continue
        lost = (outcomes[UNPRUNED].right & ~outcomes[run].right).nonzero().flatten().tolist()
        taken: dict[str, int] = {}
        for place in lost:
            taken.setdefault(asked[place].question.family, place)
        order = [taken[f] for f in ("relation", "tiny", "count", "patch", *FAMILIES) if f in taken]
        chosen += [(run, place) for place in list(dict.fromkeys(order))[:PER_METHOD]]
    return chosen


def _draw_failures(model: Any, split: str, asked: list[Item], chosen: list[tuple[Run, int]]) -> None:
    """The kept tokens of those questions, measured once more one by one."""
    shown = []
    for run, place in chosen:
        outcome = measure(model, split, [asked[place]], [run], 1, kept=True)[run]
        given = VOCABULARY[int(outcome.given[0])]
        shown.append(figures.Failure(f"{run.method}, {run.keep} of 576", asked[place], given, outcome.kept[0]))
    figures.failures_sheet(shown, split, PAGE.with_name("retention-failures.jpg"), PER_METHOD)


def write_page(table: results.Table) -> None:
    """Fill the generated sections of docs/retention.md and draw its plot."""
    text = PAGE.read_text()
    for name, content in page.sections(table).items():
        begin, end = (mark.format(name) for mark in (page.BEGIN, page.END))
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{PAGE.name} has no section {name}")
        text = pattern.sub(lambda m, c=content: f"{m.group(1)}{c}\n{m.group(2)}", text)
    PAGE.write_text(text)
    figures.plot(table, PAGE.with_name("retention.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model (default: the repository's)")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--per-family", type=int, default=250, help="questions of each family (default: 250)")
    parser.add_argument("--layer", type=int, default=1, help="a second layer for the methods inside the model; 0: none")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page-only", action="store_true", help="write the page again from the last results")
    options = parser.parse_args()
    if options.page_only:
        write_page(results.load(options.out))
        return
    model = load(options.model)
    asked = items(options.split, options.per_family)
    table = runs()
    if options.layer:
        table += runs(IN_MODEL, (OTHER_LAYER_KEEP,), options.layer)
    commit = results.commit()
    outcomes = measure(model, options.split, asked, table)
    example = next(batches(options.split, asked[:1], 1))
    seconds = prefill_seconds(model, table, example.inputs, options.rounds)
    facts = {
        "command": "make retention", "commit": commit, "cpu": _cpu(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__, "split": options.split,
    }  # fmt: skip
    results.save(options.out, facts, asked, outcomes, seconds)
    for name, value in by_family(asked, outcomes[UNPRUNED].right).items():
        print(f"{name:10} {value:6.1%}")
    for run, outcome in outcomes.items():
        print(f"{run.method:10} {run.keep:3} layer {run.layer or '-'}  {outcome.right.double().mean().item():6.1%}")
    if options.out == RESULTS:
        write_page(results.load(options.out))
        _draw_failures(model, options.split, asked, _failures(asked, outcomes, SHOWN_KEEP))


if __name__ == "__main__":
    main()
