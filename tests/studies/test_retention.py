"""The retention benchmark: statistics by hand, runs that are what a user gets, and a page made of its results file."""

import pytest
import torch

from testing import ROOT

pytest.importorskip("sklearn", reason="scikit-learn, which has the handwritten digits, is not installed")
pytest.importorskip("skimage", reason="scikit-image, which has the photographs, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which draws the plot, is not installed")

from studies.retention import measure as measuring
from studies.retention import page, results, statistics, timing
from studies.retention.measure import (
    IN_MODEL,
    KEEPS,
    METHODS,
    OWN,
    SEEDS,
    TOKENS,
    UNPRUNED,
    Outcome,
    Run,
    ask,
    measure,
    runs,
    with_other_positions,
)  # fmt: skip
from studies.vqa import model as tiny
from studies.vqa.evaluate import Item, answered, batches, items, needed
from studies.vqa.questions import FAMILIES
from studies.vqa.scene import KINDS, PATCH, scene
from testing.pages import section
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


@pytest.fixture(scope="module")
def model():
    made = tiny.build()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made.eval()


@pytest.fixture(scope="module")
def asked():
    return items("test", 1)


def test_every_family_is_asked_equally_often_and_always_the_same():
    first, second = items("validation", 2), items("validation", 2)
    assert first == second
    assert [item.question.family for item in first] == [name for name in FAMILIES for _ in range(2)]
    assert len({item.seed for item in first}) == len(first)
    assert items("validation", 1) == first[::2]
    assert items("test", 2) != first


def test_table_has_every_method_at_every_budget():
    table = runs()
    assert len(table) == (len(METHODS) - 1 + len(SEEDS)) * len(KEEPS)
    assert [f"{keep / TOKENS:.1%}" for keep in KEEPS] == ["33.3%", "22.2%", "11.1%", "5.6%"]
    assert {run.seed for run in table if run.method != "random"} == {None}
    assert all(run.layer is None for run in table)
    inside = {"coast", "sts", "adaptprune", "fastv", "dart", "pyramiddrop", "sparsevlm"}
    assert {run.method for run in runs(layer=1) if run.layer == 1} == inside


def test_wilson_interval_by_hand():
    """40 of 100: (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    right = torch.arange(100) < 40
    value = statistics.share(right)
    assert value.value == 0.4
    assert (value.low, value.high) == (pytest.approx(0.30940, abs=1e-5), pytest.approx(0.49800, abs=1e-5))


def test_change_is_paired():
    """The same accuracy with the same mistakes has no error, with other mistakes it has."""
    right = torch.arange(1000) % 4 != 0
    assert statistics.change(right, right) == (0.0, 0.0)
    other = statistics.change(right.roll(1), right)
    assert other.value == 0.0
    # Half of the questions differ, by one: the deviation is sqrt(1 / 2).
    assert other.half == pytest.approx(1.959964 * (0.5 / 999) ** 0.5, rel=1e-3)


def test_seeds_are_averaged_per_question():
    right = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert statistics.mean_share(right).value == pytest.approx(3 / 8)
    change = statistics.change(right, torch.tensor([True, True, False, False]))
    assert change.value == pytest.approx((0 - 1 + 0.5 + 0) / 4)


@pytest.mark.parametrize("method", METHODS)
def test_measured_answers_are_those_a_user_gets(model, asked, method):
    """Question by question, without the shared encoding."""
    run = Run(method, 64, None, 7 if method == "random" else None)
    outcome = measure(model, "test", asked, [run], size=1)[run]
    for batch in batches("test", asked[:4], 1):
        index = batch.indices[0]
        seed = None if run.seed is None else run.seed * 1_000_003 + index
        with torch.inference_mode(), prune_visual_tokens(model, method, 64, seed=seed) as pruning:
            word = answered(model, batch.inputs)
        assert outcome.given[index] == word
        assert torch.equal(outcome.kept[index], pruning.kept[0])
        wanted = needed(scene("test", asked[index].seed), asked[index].question)
        share = wanted[pruning.kept[0]].sum() / wanted.sum()
        assert outcome.covered[index].item() == pytest.approx(share.item(), nan_ok=True)


def test_shared_encoding_ends_with_the_measurement(model, asked):
    measure(model, "test", asked[:2], [Run("divprune", 32)])
    assert "forward" not in vars(model.model.vision_tower)


def test_all_tokens_kept_is_the_unpruned_model(model, asked):
    outcomes = measure(model, "test", asked, [Run("coast", TOKENS), Run("divprune", TOKENS)])
    for outcome in outcomes.values():
        assert torch.equal(outcome.given, outcomes[UNPRUNED].given)
        assert outcome.covered.nanmean() == 1


def test_needed_tokens_lie_on_the_objects_asked_about():
    for item in items("test", 2):
        drawn = scene("test", item.seed)
        wanted = needed(drawn, item.question).view(24, 24)
        there = [drawn.at(*cell) for cell in item.question.cells]
        assert int(wanted.sum()) == 0 or any(there)
        for thing in (thing for thing in there if thing is not None):
            assert thing.kind in KINDS
            assert wanted[(thing.top + thing.size // 2) // PATCH, (thing.left + thing.size // 2) // PATCH]


def test_results_come_back_from_their_file(tmp_path, asked):
    draw = torch.Generator().manual_seed(0)

    def outcome() -> Outcome:
        made = Outcome.empty(len(asked), 64)
        made.right[:] = torch.rand(len(asked), generator=draw) < 0.5
        made.covered[:] = 0.5
        return made

    table = [run for run in runs() if run.keep == 64]
    outcomes = {run: outcome() for run in (UNPRUNED, *table)}
    outcomes[UNPRUNED].right[:] = True
    facts = dict.fromkeys(("command", "commit", "cpu", "threads", "torch", "transformers", "split"), "x")
    results.save(tmp_path / "r.json", facts, asked, outcomes, {UNPRUNED: 0.2, table[0]: 0.1})
    read = results.load(tmp_path / "r.json")
    for run, made in outcomes.items():
        assert torch.equal(read.right[run], made.right)
    assert list(read.families) == [item.question.family for item in asked]
    sections = page.sections(read)
    assert set(sections) == {"facts", "model", "random", "keep-64"}
    row = next(line for line in sections["keep-64"].splitlines() if line.startswith("| `coast` "))
    accuracy = 100 * outcomes[table[0]].right.double().mean().item()
    assert f"| {accuracy:.1f} | **{accuracy:.1f}%** |" in row
    assert row.endswith("| 50.0 | 2.00x |")


def test_what_was_measured_before_a_run_was_stopped_is_not_measured_again(model, asked, tmp_path, monkeypatch):
    first = [Run("divprune", 32), Run("random", 32, None, 1)]
    want = measure(model, "test", asked, first, parts=tmp_path)
    seen = []
    monkeypatch.setattr(measuring, "ask", lambda m, run, *rest: (seen.append(run), ask(m, run, *rest))[1])
    got = measure(model, "test", asked, [*first, Run("scope", 32)], parts=tmp_path)
    assert set(seen) == {Run("scope", 32)}
    for run, outcome in want.items():
        assert torch.equal(got[run].given, outcome.given)
        assert torch.equal(got[run].kept, outcome.kept)


def test_other_position_ids_are_tried_where_a_method_allows_them():
    tried = with_other_positions(64)
    assert {(run.method, run.positions) for run in tried} >= {("adafv", "original"), ("divprune", "renumber")}
    assert not {run.method for run in tried} & set(IN_MODEL)


def test_timing_covers_every_run_once(model, asked):
    table = [Run("divprune", 64), Run("random", 64, None, 0), Run("random", 64, None, 1)]
    inputs = next(batches("test", asked[:1], 1)).inputs
    seconds = timing.prefill_seconds(model, table, inputs, rounds=1)
    assert list(seconds) == [UNPRUNED, *table[:2]]
    assert all(0 < value < 60 for value in seconds.values())


def test_committed_page_is_made_of_the_committed_results():
    table = results.load(ROOT / "studies" / "results" / "retention.json")
    text = (ROOT / "docs" / "retention.md").read_text()
    for name, content in page.sections(table).items():
        assert section(text, name) == content, f"run: python -m studies.retention --page-only ({name})"


def test_committed_results_are_those_of_the_committed_weights():
    """A few of the questions once more, all methods at 22.2%: the same answers are right, up to float32 rounding."""
    table = results.load(ROOT / "studies" / "results" / "retention.json")
    per_family = len(table.families) // len(FAMILIES)
    from studies.vqa.evaluate import load

    weights = load(ROOT / "studies" / "models" / "tiny-llava-vqa")
    every = items("test", per_family if per_family < 3 else 3)
    indices = [n * per_family + k for n in range(len(FAMILIES)) for k in range(len(every) // len(FAMILIES))]
    chosen = [run for run in table.right if run.keep == 128 and run.variant == OWN and run.method != "random"]
    assert set(chosen) <= set(runs())
    outcomes = measure(weights, "test", every, chosen)
    differing = sum(int((outcome.right != table.right[run][indices]).sum()) for run, outcome in outcomes.items())
    assert differing <= 0.03 * len(every) * len(outcomes), differing


def test_item_is_what_the_batches_ask():
    item = items("test", 1)[0]
    assert isinstance(item, Item)
    (batch,) = batches("test", [item], 4)
    assert batch.inputs["input_ids"].shape[0] == 1
