"""The table of the outcomes, with bars: as text, which needs no other package, and as a picture."""

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .._version import __version__
from .race import Outcome

BAR = 24  # characters of the longest; lengths are logarithms of ratios, and one for 1 has none


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def processor(device: torch.device) -> str:
    """What the user would call the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {threads} thread{'s' if threads > 1 else ''}"


def heading(device: torch.device) -> str:
    kind = "float32" if device.type == "cpu" else "16-bit floats"
    return f"tokenprune_kernels {__version__}, torch {torch.__version__}, {processor(device)}, {kind}"


def _cells(outcome: Outcome) -> tuple[str, ...]:
    row, same = outcome.row, outcome.same
    equal = "yes" if same is None or same[0] == same[1] else f"{same[0]} of {same[1]}"
    if outcome.seconds is None:
        return row.name, row.sizes, outcome.backend, "", f"({row.against})", "not timed", outcome.wrong
    ours, replaced = map(duration, outcome.seconds)
    return row.name, row.sizes, outcome.backend, ours, f"{replaced} ({row.against})", f"{outcome.ratio:.1f}x", equal


HEADER = ("step", "sizes", "backend", "ours", "instead of", "ratio", "same result")


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of text, with a bar behind each ratio."""
    cells = [HEADER, *map(_cells, outcomes)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    gains = [math.log(o.ratio) if o.seconds is not None else 0.0 for o in outcomes]
    most = max(*gains, 1e-9)
    bars = ["", *("#" * round(BAR * gain / most) for gain in gains)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), bar]).rstrip()
        for line, bar in zip(cells, bars, strict=True)
    ]


def caption(outcomes: Sequence[Outcome]) -> str:
    rounds = sorted({o.rounds for o in outcomes if o.seconds is not None})
    span = "no" if not rounds else str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    lines = [
        f"best of {span} interleaved rounds; results compared first; LLaVA-1.5-7B's sizes, random inputs; bars are "
        "logarithmic"
    ]
    waiting, cores = os.getloadavg()[0], os.cpu_count() or 1
    if waiting > cores + 1:
        lines.append(
            f"{waiting:.0f} processes want {cores} cores: what waits for threads is slower than on a quiet machine"
        )
    if {o.backend for o in outcomes} == {"reference"}:
        lines.append("no kernels served here, only the references: `python -m tokenprune_kernels info` says why")
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """The ratios as horizontal bars in a PNG."""
    from matplotlib.figure import Figure

    timed = [o for o in outcomes if o.seconds is not None]
    figure = Figure(figsize=(8, 0.6 * len(timed) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([f"{o.row.name}\n{o.row.sizes}" for o in timed], [o.ratio for o in timed], color="#2f6f9f")
    axes.bar_label(bars, [f"{o.ratio:.1f}x  ({duration(o.seconds[0])})" for o in timed if o.seconds], padding=4)
    axes.set_xscale("log")
    axes.axvline(1, color="0.4", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("how many times faster than what it replaces")
    axes.set_title(title, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)
