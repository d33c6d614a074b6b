"""The visual question task: splits without overlap, scenes that are what they say, answers that can be looked up."""

import collections

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn, which has the handwritten digits, is not installed")
pytest.importorskip("skimage", reason="scikit-image, which has the photographs, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from studies.vqa import words
from studies.vqa.questions import FAMILIES, Question, ask, chance
from studies.vqa.scene import CELL, COLOURS, DIGITS, KINDS, PATCH, Scene, scene
from studies.vqa.sources import PHOTOS, SPLITS, sources

SEEDS = range(60)


def _images(split: str) -> dict[str, list[bytes]]:
    source = sources(split)
    return {
        "digits": [image.tobytes() for of_class in source.digits for image in of_class],
        "coins": [image.tobytes() for image in source.coins],
        "faces": [image.tobytes() for image in source.faces],
        "photos": [image.tobytes() for image in source.photos],
    }


def test_no_image_is_in_two_splits():
    seen = {split: _images(split) for split in SPLITS}
    for kind in ("digits", "coins", "faces", "photos"):
        for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
            # Some of the 1,797 digits are equal pixel for pixel, though written twice.
            common = set(seen[a][kind]) & set(seen[b][kind])
            assert len(common) <= (2 if kind == "digits" else 0), (kind, a, b)
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])


def test_textures_of_the_splits_are_apart():
    """A column of the test region is nowhere in the training region."""
    for name in ("brick", "grass", "gravel"):
        train, test = (sources(split).textures[name] for split in ("train", "test"))
        columns = {train[:, n].tobytes() for n in range(train.shape[1])}
        assert not any(test[:, n].tobytes() in columns for n in range(test.shape[1]))


@pytest.mark.parametrize("cells", [1, 2, 3, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_scene_is_the_same_for_the_same_seed(split, cells):
    for seed in range(5):
        a, b = scene(split, seed, cells), scene(split, seed, cells)
        assert a.things == b.things
        assert a.textures == b.textures
        assert np.array_equal(a.pixels, b.pixels)
        assert a.pixels.shape == (cells * CELL, cells * CELL, 3)
        assert not np.array_equal(a.pixels, scene(split, seed + 1, cells).pixels)


def test_splits_do_not_share_scenes():
    assert all(scene("train", seed).things != scene("test", seed).things for seed in SEEDS)


@pytest.mark.parametrize("ease", [0.0, 0.5, 1.0])
def test_objects_lie_in_cells_of_their_own(ease):
    for seed in SEEDS:
        drawn = scene("train", seed, 4, ease)
        assert len({thing.cell for thing in drawn.things}) == len(drawn.things)
        assert sum(thing.tiny for thing in drawn.things) <= 1
        for thing in drawn.things:
            for start, cell in ((thing.top, thing.cell[0]), (thing.left, thing.cell[1])):
                assert cell * CELL <= start
                assert start + thing.size <= (cell + 1) * CELL
            assert (thing.colour in COLOURS) == (thing.kind in DIGITS)
            assert thing.size <= 2 * PATCH or not thing.tiny


def test_objects_are_where_the_scene_says():
    """Inside the box of a digit there is white ink and the sticker's colour; beyond the cells in use, a photograph."""
    for seed in SEEDS:
        drawn = scene("test", seed)
        for thing in drawn.things:
            if thing.colour is None or thing.tiny:
                continue
            box = drawn.pixels[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size].astype(int)
            assert (box.min(-1) > 200).mean() > 0.02, (seed, thing)
            near = np.abs(box - np.array(COLOURS[thing.colour])).max(-1) < 40
            assert near.mean() > 0.1, (seed, thing)


def test_tiny_digits_are_smaller_and_paler_than_all_others():
    sizes = collections.defaultdict(list)
    for seed in SEEDS:
        for thing in scene("train", seed).things:
            sizes[thing.tiny].append(thing.size)
    assert max(sizes[True]) < min(sizes[False])


def _looked_up(drawn: Scene, text: str) -> str:
    """The answer once more, from the words of the question and the list of objects alone."""
    text = text.rstrip("?").replace(",", "")
    things = drawn.things
    say = text.split()
    if text.startswith("is there a"):
        kind = say[3]
        on = [t for x in drawn.textures if x.kind in say for t in drawn.on(x)] if "on" in say else things
        return "yes" if any(t.kind == kind for t in on) else "no"
    if text.startswith("how many"):
        return str(sum(t.kind == say[2].removesuffix("s") for t in things))
    if text.startswith("which digit is on the"):
        return next(t.kind for x in drawn.textures if x.kind == say[-1] for t in drawn.on(x) if t.kind in DIGITS)
    if text.startswith("which digit is tiny"):
        return min((t for t in things if t.kind in DIGITS), key=lambda t: t.size).kind
    if text.startswith("which digit is"):
        return next(t.kind for t in things if t.colour == say[-1])
    if text.startswith("what colour"):
        return str(next(t.colour for t in things if t.kind == say[-1]))
    if text.endswith("corner"):
        row, column = 3 * (say[4] == "bottom"), 3 * (say[5] == "right")
        return next((t.kind for t in things if t.cell == (row, column)), "nothing")
    colours = [word for word in say if word in COLOURS]
    if colours:
        values = [int(next(t.kind for t in things if t.colour == colour)) for colour in colours]
        return str(max(values) if "larger" in say else sum(values))
    row, column = next(t.cell for t in things if t.kind == say[-1])
    step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    down, right = next(step[word] for word in say if word in step)
    return next(t.kind for t in things if t.cell == (row + down, column + right))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_image(family):
    asked = 0
    for seed in SEEDS:
        drawn = scene("test", seed)
        for question in FAMILIES[family](drawn):
            asked += 1
            assert question.family == family
            assert _looked_up(drawn, question.text) == question.answer, (seed, question)
    assert asked > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_can_be_answered_without_the_image(family):
    """The best answer to the words alone is right at most two times in three, in the drawn questions."""
    drawn = [
        question
        for seed in range(250)
        if next(FAMILIES[family](s := scene("test", seed)), None)
        for question in ask(s, np.random.default_rng(seed), 1, (family,))
    ]
    assert chance(drawn)[family] < 0.72, (len(drawn), chance(drawn))


def test_question_names_the_cells_it_needs():
    for seed in SEEDS:
        drawn = scene("test", seed)
        for family, find in FAMILIES.items():
            for question in find(drawn):
                there = [drawn.at(*cell) for cell in question.cells]
                if question.answer in KINDS and family not in ("count", "add"):
                    assert any(thing is not None and thing.kind == question.answer for thing in there)


def test_every_word_of_the_task_is_in_the_vocabulary():
    used = set()
    for seed in SEEDS:
        drawn = scene("train", seed)
        for find in FAMILIES.values():
            for question in find(drawn):
                used.update(words.encode(question.text), words.encode(question.answer))
                assert len(words.encode(question.answer)) == 1
    assert used <= set(range(len(words.SPECIAL), len(words.VOCABULARY)))
    with pytest.raises(ValueError, match="elephant"):
        words.encode("is there an elephant?")


def test_words_come_back_from_their_tokens():
    tokens = words.encode("How many 3s are there?")
    assert [words.VOCABULARY[t] for t in tokens] == ["how", "many", "3", "s", "are", "there", "?"]
    assert words.tokenizer()("which digit is tiny?")["input_ids"][0] == words.BOS


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: expected one of train, validation, test"):
        sources("holdout")


def test_chance_looks_at_the_words_alone():
    """a, a, b to the same words: each is guessed from the other two; the single question from all others."""
    asked = [Question("count", text, answer, ()) for text, answer in (("x", "a"), ("x", "a"), ("x", "b"), ("y", "c"))]
    assert chance(asked) == {"count": (0.5 + 0.5 + 0 + 0) / 4}
