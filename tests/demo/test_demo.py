"""The command line: `info` needs nothing beyond the package, `demo` asks a model and reports answers and times."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokenprune_kernels as tp
from testing.process import python
from tests.demo.case import MISSING, NAMES, demo, refused
from tokenprune_kernels.__main__ import EXTRAS, main

if not MISSING:
    import numpy as np
    from PIL import Image
    from rich.console import Console

    from tests.transformers.vlm import saved
    from tokenprune_kernels.demo import DemoError, answers, checkpoint, example, options, report
    from tokenprune_kernels.integrations.transformers import prune_visual_tokens

needs_extras = pytest.mark.skipif(bool(MISSING), reason=f"the demo's extras are not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with 36 visual tokens."""
    return saved.llava(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise, so that no two patches are alike."""
    path = tmp_path_factory.mktemp("photo") / "own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of this repository; while its weights are not there, the same one untrained."""
    if example.FOLDER.is_dir():
        return example.FOLDER
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    from studies.vqa import model

    folder = tmp_path_factory.mktemp("models") / example.NAME
    model.save(model.build(), folder)
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / example.IMAGE)
    return folder


@contextlib.contextmanager
def loaded(
    folder: Path, photo: str, question: str = "is there a cat?"
) -> Iterator[tuple["checkpoint.Checkpoint", dict]]:
    with checkpoint.quiet(), Image.open(photo) as image:
        found = checkpoint.load(folder, torch.device("cpu"))
        yield found, found.prompt(image.convert("RGB"), question)


# --- the command line ----------------------------------------------------------------------------------------------


def test_info_prints_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    tp.show_config()
    assert printed == capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed


def test_info_as_json_is_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tp.config()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"tokenprune_kernels {tp.__version__}\n"


@pytest.mark.parametrize("module", EXTRAS)
def test_missing_extra_is_one_line_and_info_still_works(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, "demo")
    assert line.startswith(f"tokenprune demo: {EXTRAS[module]} is not installed")
    assert "pip install 'tokenprune_kernels[demo]'" in line
    assert main(["info"]) == 0


def test_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys)
    refused(capsys, "prune")
    refused(capsys, "demo", "--focus", "0.5,0.5")


@needs_extras
def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert options.parse_methods("all") == list(NAMES)
    assert all(name in printed for name in NAMES)


@needs_extras
def test_command_shows_every_method(small: Path, tmp_path: Path) -> None:
    """Called as a user does: a process of its own, with the output in a pipe."""
    out = tmp_path / "panel.png"
    model = [] if small == example.FOLDER else ["--model", str(small)]
    done = python("-m", "tokenprune_kernels", "demo", *model, "--out", out, "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert tuple(line.split()[1] for line in done.stdout.splitlines() if "576 -> 128" in line) == NAMES
    assert done.stderr.splitlines() == [f"{name}: answered" for name in ("all tokens", *NAMES)]
    assert "\x1b" not in done.stdout + done.stderr
    assert example.QUESTION in done.stdout
    assert f"correct: {example.ANSWER}" in done.stdout
    assert example.WORLD not in done.stdout
    assert done.stdout.endswith(f"panel: {out}\n")
    with Image.open(out) as image:
        assert image.format == "PNG"


# --- options -------------------------------------------------------------------------------------------------------


@needs_extras
def test_own_deep_grey_image_and_question_get_the_note_of_the_small_model(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(0, 64000, 20, dtype=np.uint16).reshape(40, 80)).save(path)
    arguments = ["--image", str(path), "--question", "which zebra is red, 3s or  19 zebra?", "--method", "random"]
    printed = demo(capsys, small, *arguments, "--out", str(tmp_path / "p.png"))
    assert "576 -> 128" in printed
    assert "which zebra is red, 3s or 19 zebra?" in printed
    assert "correct" not in printed
    assert printed.splitlines().count(example.WORLD) == 1
    assert "\nwords that the model does not know: zebra, 19\n" in printed


@needs_extras
def test_the_small_model_knows_the_words_of_its_questions(small: Path) -> None:
    tokenizer = checkpoint.load(small, torch.device("cpu")).tokenizer
    for question in (*example.QUESTIONS, example.QUESTION, example.ANSWER):
        assert example.unknown_words(tokenizer, question) == []
    assert example.unknown_words(tokenizer, "Café? 日本 Coin") == ["Café", "日本"]
    assert example.notes(small, tokenizer, example.QUESTION, own=False) == []
    assert example.notes(small, tokenizer, "is there a dog?", own=False)[0] == example.WORLD


@needs_extras
def test_other_models_get_no_note_but_of_unknown_words(
    plain: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--image", photo, "--method", "divprune,random,divprune", "--out", str(tmp_path / "p.png")]
    printed = demo(capsys, plain, *common, "--question", "is there a cat?")
    assert [line.split()[1] for line in printed.splitlines() if "36 -> 8" in line] == ["divprune", "random"]
    assert "know" not in printed
    assert "words that the model does not know: dog" in demo(capsys, plain, *common, "--question", "is there a dog?")


@needs_extras
def test_keep_of_everything_changes_no_answer(
    plain: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = demo(
        capsys, plain, "--image", photo, "--question", "a cat", "--keep", "1.0", "--out", str(tmp_path / "p.png")
    )
    rows = [line for line in printed.splitlines() if "36 -> 36" in line]
    assert len(rows) == len(NAMES)
    assert all(" yes " in row for row in rows)


@needs_extras
def test_keep_as_count_and_ratio() -> None:
    texts = ("1", "128", "576", "0.222", "0.5", "1.0", "0.00001")
    kept = [options.kept_of(options.parse_keep(text), 576) for text in texts]
    assert kept == [1, 128, 576, 128, 288, 576, 1]
    with pytest.raises(DemoError, match="at most all 36 visual tokens, got 37"):
        options.kept_of(37, 36)


@needs_extras
@pytest.mark.parametrize("name", NAMES)
def test_row_is_what_the_integration_gives(name: str, plain: Path, photo: str) -> None:
    with loaded(plain, photo) as (found, inputs):
        before = answers.count_visual(found, inputs)
        full, row = answers.rows(found, [name], before, 9, seed=4)
        for each in (full, row):
            answers.ask(each, found, inputs, 6)
        with torch.inference_mode(), prune_visual_tokens(found.model, name, 9, seed=4) as pruning:
            ids = found.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        whole = found.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert (full.before, full.after, row.before, row.after) == (36, 36, 36, 9)
    assert row.answer == found.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert full.answer == found.tokenizer.decode(whole[0, start:], skip_special_tokens=True)
    corners = torch.stack([pruning.kept[0] % 6, pruning.kept[0] // 6], 1) / 6
    torch.testing.assert_close(row.boxes, torch.cat([corners, corners + 1 / 6], 1))


@needs_extras
def test_seed_and_longest_answer(plain: Path, photo: str) -> None:
    with loaded(plain, photo) as (found, inputs):
        boxes = []
        for seed in (0, 0, 1):
            (_, row) = answers.rows(found, ["random"], 36, 9, seed)
            answers.ask(row, found, inputs, 2)
            answers.ask(row, found, inputs, 2)
            boxes.append(row.boxes)
            assert len(row.answer.split()) <= 2
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


@needs_extras
def test_timed_rounds_are_interleaved(plain: Path, photo: str) -> None:
    steps = []
    with loaded(plain, photo) as (found, inputs):
        rows = answers.rows(found, ["sts", "fastv"], 36, 9, 0)
        answers.ask_and_time(
            rows, found, inputs, max_new_tokens=1, repeats=2, step=lambda row, new: steps.append((row.name, new))
        )
    order = [answers.ALL, "sts", "fastv"]
    assert steps == [(name, True) for name in order] + 2 * [(name, False) for name in order]
    for row in rows:
        assert len(row.seconds) == 2
        for seconds, *parts in zip(row.seconds, *row.parts.values(), strict=True):
            assert min(parts[0], seconds - sum(parts)) > 0  # the vision tower's and the language model's
            assert (min(parts[1:]) > 0) == (row.pruning is not None)
    assert 0 < rows[1].share() < 1


@needs_extras
def test_every_token_but_the_first_is_a_decoding_step(plain: Path, photo: str) -> None:
    with loaded(plain, photo) as (found, inputs):
        (full,) = answers.rows(found, [], 36, 9, 0)
        for longest, steps in ((1, 0), (4, 3)):
            found.model.generation_config.eos_token_id = None
            answers.ask(full, found, inputs, longest)
            assert len(full.steps) == steps
            assert (full.step() is None) == (steps == 0)


def made_rows() -> "list[answers.Row]":
    """What three timed rounds might leave."""
    full = answers.Row(answers.ALL, None, 36, 36, "[red]7[/red]", None, [0.2, 0.4, 0.3])
    row = answers.Row("coast", SimpleNamespace(stats={"backend": "cpu"}), 36, 9, "", None, [0.1, 0.2, 0.4])
    full.parts = {answers.VISION: [0.05, 0.06, 0.07], answers.SELECTION: [0.0] * 3, answers.COMPACTION: [0.0] * 3}
    row.parts = {answers.VISION: [0.05] * 3, answers.SELECTION: [0.007] * 3, answers.COMPACTION: [0.003] * 3}
    full.steps = [0.004, 0.009, 0.005]
    return [full, row]


@needs_extras
def test_where_the_time_went_adds_up_to_the_prefill() -> None:
    written = io.StringIO()
    Console(file=written, width=100).print(report.times(made_rows()))
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in written.getvalue().splitlines() if "│" in line
    ]
    assert cells == [
        ["all tokens", "60.00", "", "", "230.00", "5.00"],
        ["coast", "50.00", "7.00", "3.00", "140.00", ""],
    ]


@needs_extras
def test_table_shows_answers_as_they_are() -> None:
    full, row = made_rows()
    written = io.StringIO()
    console = Console(file=written, width=100)
    note = report.caption([full, row], 3, torch.device("cpu"), torch.float32, "7")
    console.print(report.table("a [b] c?", [full, row], note))
    lines = written.getvalue().splitlines()
    assert "a [b] c?" in lines[0]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "ms" in line]
    assert cells == [
        ["all tokens", "36", "[red]7[/red]", "", "300.0 ms", "", ""],
        ["coast", "36 -> 9", "(nothing)", "no", "200.0 ms", "1.50x", "5.0%"],
    ]
    assert "correct: 7" in written.getvalue()
    # The caption is as narrow as the table.
    assert "median of 3 interleaved runs on cpu" in " ".join(written.getvalue().split())


@needs_extras
def test_progress_is_a_bar_on_a_terminal() -> None:
    written = io.StringIO()
    row = answers.Row("coast", None, 36, 9)
    with report.progress(2, Console(file=written, force_terminal=True, width=80)) as step:
        step(row, True)
        step(row, False)
    assert "\x1b" in written.getvalue()
    assert "coast: answered" not in written.getvalue()


@needs_extras
def test_transformers_speaks_again_afterwards() -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with checkpoint.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


@needs_extras
def test_a_checkpoint_of_the_hub_is_found_in_its_cache(
    plain: Path, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout of the cache is the hub's: a reference to a commit, and a snapshot of its files."""
    from huggingface_hub import constants, file_download

    for module in (constants, file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    stored, commit = tmp_path / "models--owner--name", "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    (stored / "snapshots").mkdir()
    (stored / "snapshots" / commit).symlink_to(plain)
    arguments = ["--image", photo, "--question", "a cat", "--method", "random", "--out", str(tmp_path / "p.png")]
    assert "36 -> 8" in demo(capsys, Path("owner/name"), *arguments)
    assert example.model_folder("owner/name") == stored / "snapshots" / commit


@needs_extras
def test_a_folder_comes_before_an_id_of_the_hub(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    assert example.model_folder("owner/name") == Path("owner/name")


# --- refusals ------------------------------------------------------------------------------------------------------


@needs_extras
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "{tmp}/none.png"], "no such file"),
        (["--image", "{tmp}"], "not a file"),
        (["--image", "{tmp}/text.png"], "not a readable image"),
        (["--image", "{tmp}/cut.png"], "not a readable image"),
        (["--question", "  "], "--question: it is empty"),
        (["--question", "is <image> a cat?"], "--question: the question must not contain the image placeholder"),
        (["--keep", "37"], "at most all 36 visual tokens, got 37"),
        (["--keep", "0"], "at least 1"),
        (["--keep", "-3"], "at least 1"),
        (["--keep", "0.0"], "a ratio must be above 0"),
        (["--keep", "1.5"], "a ratio must be above 0 and at most 1.0"),
        (["--keep", "many"], "expected a count"),
        (["--keep", "1.e999"], "a ratio must be"),
        (["--method", "coats"], "unknown method 'coats'"),
        (["--method", ""], "unknown method ''"),
        (["--out", "{tmp}/panel.jpg"], "ends in .png"),
        (["--out", "{tmp}/no/panel.png"], "no such folder"),
        (["--out", "{tmp}/folder.png"], "cannot write"),
        (["--out", "/proc/panel.png"], "cannot write"),
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "two"], "--repeats"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--device", "abacus"], "--device"),
        (
            ["--image", "https://example.org/a.png"],
            "takes the path of a file and loads nothing from an address",
        ),
        (["--model", "{tmp}/none"], "--model: no such folder"),
        (["--model", "owner/name"], "nothing is downloaded here, to do that run: hf download owner/name"),
        (["--model", "{tmp}/whole.png"], "--model: not a folder"),
        (["--model", "{tmp}"], "no config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], says: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    defaults = {"--model": str(plain), "--image": str(whole), "--out": str(tmp_path / "panel.png")}
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    others = [part for pair in defaults.items() if pair[0] not in given for part in pair]
    answered = "/proc/panel.png" in given  # only the attempt tells
    if answered:
        others += ["--method", "random", "--repeats", "1", "--max-new-tokens", "1"]
        with pytest.raises(SystemExit):
            main(["demo", *given, *others])
        assert says in capsys.readouterr().err.splitlines()[-1]
        return
    assert says in refused(capsys, "demo", *given, *others)
    assert not (tmp_path / "panel.png").exists()


@needs_extras
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA device" in refused(capsys, "demo", "--device", "cuda")


@needs_extras
def test_without_a_checkout_there_are_no_weights_and_no_example(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "FOLDER", tmp_path / "nowhere")
    out = ["--out", str(tmp_path / "p.png")]
    line = refused(capsys, "demo", *out)
    assert line.startswith("tokenprune demo: --model: weights come with a checkout")
    assert f"models/{example.NAME}" in line
    assert "--image: the example image is not there" in refused(capsys, "demo", "--model", str(plain), *out)
