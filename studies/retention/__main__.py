"""`python -m studies.retention`: measure, write the results, the figures and the tables of the page.

Every batch of questions leaves its outcomes under build/retention, and the same command on the same commit goes on
from there.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
import transformers

from studies.vqa.evaluate import Item, batches, by_family, items, load
from studies.vqa.questions import FAMILIES
from studies.vqa.words import VOCABULARY
from testing import ROOT
from testing.machine import commit, processor
from testing.pages import fill

from . import figures, page, results
from .measure import IN_MODEL, METHODS, TOKENS, UNPRUNED, Outcome, Run, measure, runs, with_other_positions
from .timing import prefill_seconds

MODEL = ROOT / "studies" / "models" / "tiny-llava-vqa"
RESULTS = ROOT / "studies" / "results" / "retention.json"
PAGE = ROOT / "docs" / "retention.md"
SHOWN_KEEP = 64  # of the images of failures
VARIANTS_KEEP = 128  # the budget at which a second layer and the other position ids are tried
PER_METHOD = 4


def _failures(asked: list[Item], outcomes: dict[Run, Outcome], keep: int) -> list[figures.Failure]:
    """For every method, questions of different families that only the unpruned model answers correctly."""
    chosen = []
    for method in METHODS:
        run, outcome = next(
            (r, o) for r, o in outcomes.items() if (r.method, r.keep, r.variant) == (method, keep, (None, None))
        )
        lost = (outcomes[UNPRUNED].right & ~outcome.right).nonzero().flatten().tolist()
        taken: dict[str, int] = {}
        for index in lost:
            taken.setdefault(asked[index].question.family, index)
        families = [name for name in dict.fromkeys(("relation", "tiny", "count", "patch", *FAMILIES)) if name in taken]
        for index in (taken[name] for name in families[:PER_METHOD]):
            given = VOCABULARY[int(outcome.given[index])]
            chosen.append(
                figures.Failure(f"{method}, {run.keep} of {TOKENS}", asked[index], given, outcome.kept[index])
            )
    return chosen


def write_page(table: results.Table) -> None:
    """Fill the generated sections of docs/retention.md and draw its plot."""
    text = PAGE.read_text()
    for name, content in page.sections(table).items():
        text = fill(text, name, content)
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
        table += runs(IN_MODEL, (VARIANTS_KEEP,), options.layer)
    table += with_other_positions(VARIANTS_KEEP)
    at = commit()
    parts = ROOT / "build" / "retention" / f"{at.replace(' ', '-')}-{options.split}-{options.per_family}"
    outcomes = measure(model, options.split, asked, table, parts=parts)
    example = next(batches(options.split, asked[:1], 1))
    seconds = prefill_seconds(model, table, example.inputs, options.rounds)
    given = f' ARGS="{shlex.join(sys.argv[1:])}"' if sys.argv[1:] else ""
    facts = {
        "command": f"make retention{given}", "commit": at, "cpu": processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__, "split": options.split,
    }  # fmt: skip
    results.save(options.out, facts, asked, outcomes, seconds)
    for name, value in by_family(asked, outcomes[UNPRUNED].right).items():
        print(f"{name:10} {value:6.1%}")
    for run, outcome in outcomes.items():
        name = f"{run.method:10} {run.keep:3} layer {run.layer or '-'} {run.positions or '-':8}"
        print(f"{name} {outcome.right.double().mean().item():6.1%}")
    if options.out == RESULTS:
        write_page(results.load(options.out))
        lost = _failures(asked, outcomes, SHOWN_KEEP)
        figures.failures_sheet(lost, options.split, PAGE.with_name("retention-failures.jpg"), PER_METHOD)


if __name__ == "__main__":
    main()
