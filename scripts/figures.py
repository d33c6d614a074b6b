"""Draw docs/figures from the results that are committed: bench/results/cpu.json and studies/results/retention.json.

usage: python -m scripts.figures [--check]

A figure is a small SVG file, readable on a light and on a dark page: no background, colours in the middle of the scale
that also differ for the colour-blind, and a marker or a label beside each. It carries the SHA-256 of the numbers in it,
by which `--check` and a test see that it is out of date; the same numbers give the same bytes.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.report import Row, duration
from scripts.shown import SHOWN_METHODS, SHOWN_OPS, measured, retained
from testing import ROOT

FOLDER = ROOT / "docs" / "figures"
GREY = "#7a7f87"  # of words and axes: 4 to 1 on white and on black
COLOURS = {"ours": "#0f7fd0", "torch": "#d0620a", "reference": "#a2559f", "floor": GREY}
MARKERS = {"ours": "o", "torch": "s", "reference": "^", "floor": "x"}
SIZES = {"LLaVA-1.5-7B": 576, "LLaVA-NeXT-7B": 2880, "InternVL3-8B": 3328, "Qwen2.5-VL-7B@4096": 4096}
SIZES["Qwen2.5-VL-7B@16384"] = 16384
# The panels of scaling.svg: a title, which rows (the first group names the model), and the baselines of interest.
PANELS = (
    ("select_topk, one sample", r"select_topk, (\S+), 1 x \d+ -> \d+", {"torch.topk + sort": "torch"}),
    ("select_mixture", r"select_mixture, (\S+), \d+ -> \d+", {"reference": "reference"}),
    (
        "attention scores, 64 queries, float32",
        r"scores, (\S+), M=64, float32",
        {"reference": "reference", "QK^T alone": "floor"},
    ),
)


class Bar(NamedTuple):
    name: str
    value: float
    group: str


class Line(NamedTuple):
    """Seconds over the number of visual tokens."""

    name: str
    colour: str
    points: list[tuple[int, float]]


class Panel(NamedTuple):
    title: str
    lines: list[Line]


def rows() -> list[Row]:
    return [Row(**row) for row in measured()["rows"]]


# --- the numbers of each figure ------------------------------------------------------------------------------------


def ratios() -> list[Bar]:
    """What README's table has: how many times as long the baseline takes."""
    found = {(row.case, row.baseline): row.ratio for row in rows()}
    groups = {"ops": SHOWN_OPS, "methods, against eager PyTorch": SHOWN_METHODS}
    return [
        Bar(shown.name, found[shown.case, shown.baseline], group)
        for group, all_shown in groups.items()
        for shown in all_shown
        if (shown.case, shown.baseline) in found
    ]


def scaling() -> list[Panel]:
    """Times over N, ours and what it is compared with."""
    panels = []
    for title, pattern, baselines in PANELS:
        ours: dict[int, float] = {}
        others: dict[str, dict[int, float]] = {name: {} for name in baselines}
        for row in rows():
            found = re.fullmatch(pattern, row.case)
            if found and found[1] in SIZES and row.baseline in others:
                ours[SIZES[found[1]]] = row.ours
                others[row.baseline][SIZES[found[1]]] = row.ours * row.ratio
        lines = [Line("ours", "ours", sorted(ours.items()))]
        lines += [Line(name, baselines[name], sorted(times.items())) for name, times in others.items()]
        panels.append(Panel(title, lines))
    return panels


def accuracy() -> list[Bar]:
    """The share of the unpruned model's accuracy that each method keeps, in percent; best first."""
    kept = retained()
    bars = [Bar(name, 100 * share, "chance" if name == "random" else "methods") for name, share in kept.items()]
    return sorted(bars, key=lambda bar: -bar.value)


# --- drawing ------------------------------------------------------------------------------------------------------


def _bars(plt: Any, groups: list[list[Bar]], label: Callable[[Bar], str], axis: str, log: bool) -> Any:
    number = sum(map(len, groups))
    heights = [len(group) + 1 for group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7.4, 0.26 * number + 0.5 * len(groups) + 0.4), squeeze=False, sharex=True,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for (axis_of_group,), group in zip(axes, groups, strict=True):
        colours = [COLOURS["floor" if bar.group == "chance" else "ours"] for bar in group]
        start = 1 if log else 0  # a ratio of 1 is no bar
        widths = [bar.value - start for bar in group]
        drawn = axis_of_group.barh(range(len(group)), widths, left=start, color=colours, height=0.7)
        axis_of_group.bar_label(drawn, [label(bar) for bar in group], padding=3, color=GREY, fontsize=9)
        axis_of_group.set_yticks(range(len(group)), [bar.name for bar in group])
        axis_of_group.invert_yaxis()
        axis_of_group.margins(x=0.12)
        if log:
            axis_of_group.set_xscale("log")
            axis_of_group.axvline(1, color=GREY, linewidth=1)
            axis_of_group.set_xticks((1, 2, 5, 10, 20, 50, 100), ("1x", "2x", "5x", "10x", "20x", "50x", "100x"))
            axis_of_group.minorticks_off()
    axes[-1][0].set_xlabel(axis)
    return figure


def draw_ratios(plt: Any, bars: list[Bar]) -> Any:
    groups = {bar.group: [b for b in bars if b.group == bar.group] for bar in bars}
    figure = _bars(plt, list(groups.values()), lambda bar: f"{bar.value:.1f}x", "baseline / ours, log scale", True)
    for axes, name in zip(figure.axes, groups, strict=True):
        axes.set_title(name, loc="left", fontsize=10)
    return figure


def draw_accuracy(plt: Any, bars: list[Bar]) -> Any:
    axis = "accuracy kept with 128 of 576 visual tokens, % of the unpruned model's"
    figure = _bars(plt, [bars], lambda bar: f"{bar.value:.1f}", axis, False)
    figure.axes[0].set_xlim(0, 115)
    return figure


def draw_scaling(plt: Any, panels: list[Panel]) -> Any:
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.4))
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            x, y = zip(*line.points, strict=True)
            style = {"color": COLOURS[line.colour], "marker": MARKERS[line.colour], "markersize": 5}
            axis.plot(x, y, label=line.name, linestyle="-" if line.name == "ours" else "--", **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = (512, 1024, 2048, 4096, 8192, 16384)
        axis.set_xticks(ticks, [str(tick) if tick < 1000 else f"{tick // 1024}k" for tick in ticks])
        axis.yaxis.set_major_formatter(lambda seconds, _: duration(seconds) if seconds < 1 else f"{seconds:g} s")
        axis.minorticks_off()
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("visual tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, frameon=False)
    return figure


FIGURES: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "ratios": (ratios, draw_ratios),
    "scaling": (scaling, draw_scaling),
    "accuracy": (accuracy, draw_accuracy),
}


def digest(numbers: object) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def up_to_date(name: str) -> bool:
    """Whether the file was drawn from these numbers."""
    file, (numbers, _) = FOLDER / f"{name}.svg", FIGURES[name]
    return file.exists() and f"sha256:{digest(numbers())}" in file.read_text()


def draw(name: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": GREY, "savefig.transparent": True}
    numbers, drawing = FIGURES[name]
    with matplotlib.rc_context(style):
        figure = drawing(plt, numbers())
        figure.tight_layout()
        # Neither the date nor the version of matplotlib: the same numbers give the same bytes.
        about = {"Date": None, "Creator": None, "Title": name, "Description": f"sha256:{digest(numbers())}"}
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{name}.svg", metadata=about)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing; fail when a figure is out of date")
    check = parser.parse_args().check
    for name in FIGURES:
        if not check:
            draw(name)
        elif not up_to_date(name):
            raise SystemExit(f"docs/figures/{name}.svg is out of date: run python -m scripts.figures")


if __name__ == "__main__":
    main()
