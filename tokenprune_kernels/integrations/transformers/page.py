"""A page that shows what methods kept of the images of a prompt, and in which order: one file, which needs no other."""

import base64
import importlib.resources
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .overlay import numbered, opened, tokens_of
from .report import Report
from .saved import RANK, by_token

SIDE = 1024  # pixels: larger images are made smaller
DIGITS = 6


class Choice(NamedTuple):
    """What one method kept of a sample. kept: tokens, ascending. layers: in front of which it pruned. saved: of each of
    them what the method told, [V] of every visual token of the sample."""

    title: str
    kept: list[int]
    layers: list[int]
    saved: Mapping[int, Mapping[str, Tensor]]


class Panel(NamedTuple):
    """An image, a PIL one, and its tokens with what they see: left, top, right, bottom in parts of it."""

    number: int
    image: Any
    tokens: Tensor  # [N]
    boxes: Tensor  # [N, 4]


def orders_of(choice: Choice) -> list[dict[str, Any]]:
    """Ways to put the kept tokens in order, each in steps of tokens that appear together."""
    kept = set(choice.kept)
    orders: list[dict[str, Any]] = []
    for at, name, values in _details(choice):
        if name == RANK:
            picks = sorted((rank, token) for token in kept if (rank := values[token]) >= 0)
            called = "order of selection"
        else:
            picks = sorted((-value, token) for token in kept if (value := values[token]) == value)
            called = f"{name}, high to low"
        steps = [[token] for _, token in picks]
        rest = sorted(kept.difference(*steps))
        orders.append({"name": called + at, "steps": [*steps, rest] if rest else steps})
    orders.sort(key=lambda order: not order["name"].startswith("order of selection"))
    return orders or [{"name": "dropped, then kept", "steps": [choice.kept]}]


def _details(choice: Choice) -> Iterator[tuple[str, str, list[float]]]:
    """(where, if several layers told something; name; values), the last layer's first."""
    several = sum(map(bool, choice.saved.values())) > 1
    for layer, details in reversed(list(choice.saved.items())):
        for name, values in details.items():
            yield (f" in front of layer {layer}" if several else ""), name, values.tolist()


def _scores(choice: Choice) -> dict[str, list[float | str | None]]:
    """What the page says of a token that is pointed at; ranks count from 1."""
    return {name + at: [_said(name, value) for value in values] for at, name, values in _details(choice)}


def _said(name: str, value: float) -> float | str | None:
    """None where a token has no number; JSON has none for infinity."""
    if name == RANK:
        return value + 1 if value >= 0 else None
    if math.isnan(value):
        return None
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def _panel(panel: Panel, kept: set[int]) -> dict[str, Any]:
    image = panel.image.copy()
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=90)
    tokens = [
        {
            "index": index,
            "kept": index in kept,
            "box": [round(value, DIGITS) for value in (left, top, right - left, bottom - top)],
        }
        for index, (left, top, right, bottom) in zip(panel.tokens.tolist(), panel.boxes.tolist(), strict=True)
    ]
    return {
        "image": panel.number,
        "source": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "tokens": tokens,
    }


def page_of(choices: Sequence[Choice], panels: Sequence[Panel], total: int) -> str:
    """The page: the first method's tokens are what it shows without scripts."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ImportError(
            "prune_visual_tokens: save_html needs jinja2, run: pip install 'tokenprune_kernels[html]'"
        ) from None
    text = importlib.resources.files(__package__).joinpath("page.html.jinja").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    kept = set(choices[0].kept)
    methods = [
        {
            "title": choice.title,
            "kept": choice.kept,
            "layers": choice.layers,
            "orders": orders_of(choice),
            "scores": _scores(choice),
        }
        for choice in choices
    ]
    return environment.from_string(text).render(
        methods=methods, panels=[_panel(panel, kept) for panel in panels], total=total
    )


def _choice(title: str, report: Report, sample: int) -> Choice:
    _, kept = report.shown()
    told = {layer: by_token(each, report.before) for layer, each in report.told_at.items()}
    saved = {layer: {name: values[sample] for name, values in each.items()} for layer, each in told.items()}
    return Choice(title, [token for token in kept[sample].tolist() if token >= 0], list(report.kept_at), saved)


def save_page(path: Path, blocks: Sequence[tuple[str, Report]], image: Any, sample: int, first: int) -> None:
    """blocks: the methods' titles and what their blocks report; the images are those of the first one's prompt."""
    (title, report), *others = blocks
    images = numbered(report, image, sample, first)
    layout, _ = report.shown()
    for other, of_other in others:
        seen, _ = of_other.shown()
        if of_other.before != report.before or not torch.equal(seen.boxes, layout.boxes):
            raise ValueError(
                f"prune_visual_tokens: save_html shows blocks that pruned the same prompt; {other} had visual tokens "
                f"{of_other.before} and {title} {report.before}, or they lie elsewhere"
            )
    tokens = torch.arange(report.before[sample])
    panels = [Panel(n, opened(one), *tokens_of(layout, tokens, sample, n)) for n, one in images.items()]
    choices = [_choice(*block, sample) for block in blocks]
    path.write_text(page_of(choices, panels, report.before[sample]), encoding="utf-8")
