"""docs/retention.md: the tables of a results file, in words and numbers."""

import numpy as np

from studies.vqa.questions import FAMILIES

from .measure import TOKENS, UNPRUNED, Variant
from .results import Table
from .statistics import Change, change, mean_share, share


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: Change) -> str:
    return f"{100 * value.value:+.1f} ± {100 * value.half:.1f}"


def keeps(table: Table) -> list[int]:
    return sorted({run.keep for run in table.right if run != UNPRUNED}, reverse=True)


def budget(keep: int) -> str:
    return f"{100 * keep / TOKENS:.1f}%"


def model_table(table: Table) -> str:
    """Accuracy of the unpruned model, overall and per family."""
    right = table.right[UNPRUNED]
    whole = share(right)
    families = map(percent, table.by_family(right))
    lines = ["| | all | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 2) + "|"]
    lines.append(
        f"| unpruned | {percent(whole.value)} ({percent(whole.low)} to {percent(whole.high)}) | "
        + " | ".join(families)
        + " |"
    )
    return "\n".join(lines)


def _row(table: Table, method: str, keep: int, variant: Variant, name: str) -> str:
    right, full = table.of(method, keep, variant), table.right[UNPRUNED]
    accuracy = mean_share(right)
    runs = table.of_runs(method, keep, variant)
    covered = np.mean([table.covered[run] for run in runs])
    took = table.seconds.get(runs[0])
    ratio = f"{table.seconds[UNPRUNED] / took:.2f}x" if took else ""
    kept = accuracy.value / share(full).value
    cells = (
        percent(accuracy.value),
        f"**{percent(kept)}%**",
        points(change(right, full)),
        *map(percent, table.by_family(right)),
        percent(float(covered)),
        ratio,
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def budget_table(table: Table, keep: int) -> str:
    """All methods at one budget."""
    heads = ("method", "accuracy", "of unpruned", "change, points", *FAMILIES, "needed tokens kept", "prefill")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for variant in table.variants():
        measured = [method for method in table.methods() if table.of_runs(method, keep, variant)]
        layer, positions = variant
        at = (f", layer {layer}" if layer is not None else "") + (f", positions {positions}" if positions else "")
        lines += [_row(table, method, keep, variant, f"`{method}`{at}") for method in measured]
    return "\n".join(lines)


def against_random(table: Table) -> str:
    """Accuracy minus random's on the same questions, in points."""
    heads = ("method", *(budget(keep) for keep in keeps(table)))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in table.methods():
        if method == "random":
            continue
        cells = []
        for keep in keeps(table):
            chance = table.of("random", keep).double().mean(0)
            cells.append(points(change(table.of(method, keep), chance)))
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def facts_line(table: Table) -> str:
    f = table.facts
    return (
        f"`{f['command']}` on {f['cpu']}, {f['threads']} threads, torch {f['torch']}, "
        f"transformers {f['transformers']}, "
        f"commit {f['commit']}; {len(table.families)} questions of the split {f['split']}, each about its own image."
    )


def sections(table: Table) -> dict[str, str]:
    """Every generated section of the page, by name."""
    filled = {"facts": facts_line(table), "model": model_table(table), "random": against_random(table)}
    return filled | {f"keep-{keep}": budget_table(table, keep) for keep in keeps(table)}
