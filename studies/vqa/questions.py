"""Questions about a scene, in families, each with one exact answer of one word.

Answers are balanced inside a family where scenes allow: a model that ignores the image stays near `chance`.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .scene import COLOURS, DIGITS, KINDS, Scene, Thing

CORNERS = ((0, 0, "top left"), (0, -1, "top right"), (-1, 0, "bottom left"), (-1, -1, "bottom right"))
SIDES = ((0, -1, "left of"), (0, 1, "right of"), (-1, 0, "above"), (1, 0, "below"))


class Question(NamedTuple):
    """A question, its answer, the family it belongs to, and the cells that have to be seen for it."""

    family: str
    text: str
    answer: str
    cells: tuple[tuple[int, int], ...]


def _single(things: list[Thing]) -> Thing | None:
    return things[0] if len(things) == 1 else None


def _digits(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if thing.kind in DIGITS]


def _of_kind(scene: Scene, kind: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.kind == kind]


def _name(thing: Thing) -> str:
    return f"the {thing.kind}"


def _exist(scene: Scene) -> Iterator[Question]:
    for kind in KINDS:
        there = _of_kind(scene, kind)
        cells = tuple(t.cell for t in there)
        yield Question("exist", f"is there a {kind}?", "yes" if there else "no", cells)


def _count(scene: Scene) -> Iterator[Question]:
    for kind in KINDS:
        there = _of_kind(scene, kind)
        if len(there) <= 3:
            cells = tuple(t.cell for t in there)
            yield Question("count", f"how many {kind}s are there?", str(len(there)), cells)


def _patch(scene: Scene) -> Iterator[Question]:
    """What lies on the texture."""
    for texture in scene.textures:
        digits = [t for t in scene.on(texture) if t.kind in DIGITS]
        only = _single(digits)
        if only is not None:
            yield Question("patch", f"which digit is on the {texture.kind}?", only.kind, (only.cell,))
        for kind in sorted({t.kind for t in scene.things}):
            on = [t for t in scene.on(texture) if t.kind == kind]
            cells = tuple(t.cell for t in (on or _of_kind(scene, kind)))
            yield Question("patch", f"is there a {kind} on the {texture.kind}?", "yes" if on else "no", cells)


def _corner(scene: Scene) -> Iterator[Question]:
    """Only of whole images: a window's corners are somewhere inside."""
    if scene.cells < 4:
        return
    for row, column, name in CORNERS:
        cell = row % scene.cells, column % scene.cells
        thing = scene.at(*cell)
        yield Question("corner", f"what is in the {name} corner?", thing.kind if thing else "nothing", (cell,))


def _relation(scene: Scene) -> Iterator[Question]:
    """The neighbour, in the next cell, of an object that is there once."""
    for thing in scene.things:
        if len(_of_kind(scene, thing.kind)) > 1:
            continue
        for down, right, words in SIDES:
            other = scene.at(thing.cell[0] + down, thing.cell[1] + right)
            if other is not None:
                yield Question("relation", f"what is {words} {_name(thing)}?", other.kind, (thing.cell, other.cell))


def _tiny(scene: Scene) -> Iterator[Question]:
    """The answer sits on a small, pale object."""
    for thing in scene.things:
        if thing.tiny:
            yield Question("tiny", "which digit is tiny?", thing.kind, (thing.cell,))


def _colour(scene: Scene) -> Iterator[Question]:
    for thing in _digits(scene):
        assert thing.colour is not None
        if len(_of_kind(scene, thing.kind)) == 1:
            yield Question("colour", f"what colour is {_name(thing)}?", thing.colour, (thing.cell,))
    for colour in COLOURS:
        only = _single([t for t in _digits(scene) if t.colour == colour])
        if only is not None:
            yield Question("colour", f"which digit is {colour}?", only.kind, (only.cell,))


def _pairs(scene: Scene) -> Iterator[tuple[Thing, Thing]]:
    """Digits known by their colours, in both orders."""
    unique = [_single([t for t in _digits(scene) if t.colour == colour]) for colour in COLOURS]
    return itertools.permutations([thing for thing in unique if thing is not None], 2)


def _compare(scene: Scene) -> Iterator[Question]:
    for a, b in _pairs(scene):
        if a.kind != b.kind:
            larger = max(a, b, key=lambda t: int(t.kind))
            text = f"which is larger, the {a.colour} digit or the {b.colour} digit?"
            yield Question("compare", text, larger.kind, (a.cell, b.cell))


def _add(scene: Scene) -> Iterator[Question]:
    for a, b in _pairs(scene):
        total = str(int(a.kind) + int(b.kind))
        yield Question("add", f"what is the {a.colour} digit plus the {b.colour} digit?", total, (a.cell, b.cell))


FAMILIES: dict[str, Callable[[Scene], Iterator[Question]]] = {
    "exist": _exist, "count": _count, "patch": _patch, "corner": _corner, "relation": _relation, "tiny": _tiny,
    "colour": _colour, "compare": _compare, "add": _add,
}  # fmt: skip
BALANCED = ("exist", "count", "patch", "corner")  # whose common answers would otherwise drown the others


def _draw(family: str, candidates: list[Question], rng: np.random.Generator) -> Question:
    if family in BALANCED:
        # "nothing" and "0" stand for one answer each, every object for one answer together.
        groups: dict[str, list[Question]] = {}
        for question in candidates:
            one = "what" if family == "corner" and question.answer in KINDS else question.answer
            groups.setdefault(one, []).append(question)
        candidates = groups[sorted(groups)[rng.integers(len(groups))]]
    return candidates[rng.integers(len(candidates))]


def ask(
    scene: Scene, rng: np.random.Generator, count: int, families: tuple[str, ...] = tuple(FAMILIES)
) -> list[Question]:
    """So many questions about the scene, each family as often as it is named; some questions may be asked twice.

    Families that have nothing to ask about this scene are left out.
    """
    candidates = {name: found for name in families if (found := list(FAMILIES[name](scene)))}
    names = [name for name in families if name in candidates]
    turns = itertools.islice(itertools.cycle(rng.permutation(names)), count)
    return [_draw(str(name), candidates[str(name)], rng) for name in turns]


def chance(questions: list[Question]) -> dict[str, float]:
    """Per family: the accuracy of answering from the words of the question alone.

    Each question gets the most common answer to the same words among the others, or if there are none to the others of
    its family; ties count in parts.
    """
    by_text: Counter[tuple[str, str, str]] = Counter((q.family, q.text, q.answer) for q in questions)
    texts: dict[tuple[str, str], Counter[str]] = {}
    families: dict[str, Counter[str]] = {}
    for (family, text, answer), count in by_text.items():
        texts.setdefault((family, text), Counter())[answer] += count
        families.setdefault(family, Counter())[answer] += count
    right = dict.fromkeys(families, 0.0)
    for question in questions:
        others = texts[question.family, question.text] - Counter([question.answer])
        others = others or families[question.family] - Counter([question.answer])
        best = [answer for answer, count in others.items() if count == max(others.values())]
        right[question.family] += (question.answer in best) / max(1, len(best))
    return {family: hits / families[family].total() for family, hits in right.items()}
