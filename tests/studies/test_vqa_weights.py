"""The committed weights: small, made by the committed curriculum, and good at the task they are measured on."""

import csv
import json
import re
import subprocess

import pytest
import torch

from testing import ROOT

pytest.importorskip("sklearn", reason="scikit-learn, which has the handwritten digits, is not installed")
pytest.importorskip("skimage", reason="scikit-image, which has the photographs, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from studies.vqa import model as tiny
from studies.vqa import train, words
from studies.vqa.card import EXAMPLE
from studies.vqa.evaluate import accuracy, by_family, load
from studies.vqa.questions import FAMILIES
from studies.vqa.scene import scene

FOLDER = ROOT / "studies" / "models" / "tiny-llava-vqa"


def test_everything_fits_into_the_repository():
    tracked = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in tracked) < 16 << 20
    names = {path.name for path in tracked}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= names


def test_configuration_is_the_one_that_is_trained():
    committed = json.loads((FOLDER / "config.json").read_text())
    assert committed["vision_config"]["hidden_size"] == tiny.WIDTH == committed["text_config"]["hidden_size"]
    assert committed["text_config"]["vocab_size"] == len(words.VOCABULARY)
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary == {word: n for n, word in enumerate(words.VOCABULARY)}


def test_log_is_that_of_the_curriculum():
    with (FOLDER / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = {int(row["stage"]): int(row["step"]) for row in rows}
    assert ends == {n: stage.steps for n, stage in enumerate(train.STAGES)}
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_weights_answer_questions_about_images_they_have_not_seen():
    """The benchmark's floor: 80% over all families, here on 20 questions of each."""
    asked, right = accuracy(load(FOLDER), "test", 20)
    assert right.double().mean() >= 0.8, by_family(asked, right)


def test_card_states_what_was_measured():
    text = (FOLDER / "README.md").read_text()
    row = r"^\| (\w+) \|[^|]*\| \*\*([\d.]+)%\*\* \| [\d.]+% \| ([\d.]+)% \|$"
    found = re.findall(row, text, re.MULTILINE)
    shares, guess = ({line[0]: float(line[n]) for line in found} for n in (1, 2))
    assert set(shares) == {*FAMILIES, "all"}
    assert shares["all"] >= 80
    assert all(shares[name] > guess[name] + 3 for name in FAMILIES), (shares, guess)
    assert shares["all"] == pytest.approx(sum(shares[name] for name in FAMILIES) / len(FAMILIES), abs=0.1)


def test_example_is_a_scene_of_the_test_split():
    from PIL import Image

    with Image.open(FOLDER / "example.png") as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    made = torch.from_numpy(scene("test", EXAMPLE).pixels).flatten()
    # Other versions of the image libraries may round differently.
    assert ((pixels.int() - made.int()).abs() <= 8).double().mean() > 0.99


def test_nothing_of_the_training_is_in_the_repository_by_accident():
    listed = subprocess.run(
        ["git", "-C", str(FOLDER), "ls-files", "--", "."], capture_output=True, text=True, check=False
    ).stdout.split()
    assert not any(name.endswith((".pt", ".part", ".bin")) for name in listed)
