"""The demo with checkpoints of other families, and with folders that are no such checkpoint."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.demo.case import MISSING, NAMES, demo, refused

if MISSING:
    pytest.skip(f"the demo's extras are not installed: {', '.join(MISSING)}", allow_module_level=True)

import numpy as np
from PIL import Image

from tests.transformers.vlm import saved
from tokenprune_kernels.demo import checkpoint


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 88, 3), dtype=np.uint8)).save(path)
    return str(path)


def _rows(printed: str) -> dict[str, str]:
    """method: tokens before and after."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if " -> " in line]
    return {method: tokens for method, tokens, *_ in cells}


def test_llava_next(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved.llava_next(tmp_path / "next")
    out = tmp_path / "p.png"
    printed = demo(capsys, folder, "--image", photo, "--question", "a cat?", "--keep", "7", "--out", str(out))
    rows = _rows(printed)
    assert tuple(rows) == NAMES
    assert {tokens.split()[-1] for tokens in rows.values()} == {"7"}
    assert out.is_file()


def test_qwen2_5_vl(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its processor includes one for videos, which takes torchvision: without it the refusal says so."""
    folder = saved.qwen2_5_vl(tmp_path / "qwen")
    out = tmp_path / "p.png"
    arguments = ["--image", photo, "--question", "a cat?", "--keep", "7", "--out", str(out)]
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision is not installed" in refused(capsys, "demo", "--model", str(folder), *arguments)
        return
    rows = _rows(demo(capsys, folder, *arguments))
    assert tuple(rows) == NAMES
    assert out.is_file()


def test_unsupported_family_is_the_integrations_error(
    photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "demo", "--model", str(tmp_path), "--image", photo, "--out", str(tmp_path / "p.png"))
    assert "--model: prune_visual_tokens: GPT2LMHeadModel (model_type 'gpt2') is not supported" in line
    assert "llava_next" in line


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no such type"}'])
def test_damaged_config_is_one_line(text: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    line = refused(capsys, "demo", "--model", str(tmp_path), "--image", photo, "--out", str(tmp_path / "p.png"))
    assert f"--model: cannot load {tmp_path}" in line


def test_damaged_and_missing_weights_are_one_line(
    plain: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    arguments = ["demo", "--model", str(folder), "--image", photo, "--out", str(tmp_path / "p.png")]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"--model: cannot load {folder}" in refused(capsys, *arguments)
    weights.unlink()
    assert f"--model: cannot load {folder}" in refused(capsys, *arguments)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert f"--model: cannot load the processor of {folder}" in refused(capsys, *arguments)


def test_checkpoint_without_chat_template_is_one_line(
    photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved.llava(tmp_path / "model", template=False)
    line = refused(capsys, "demo", "--model", str(folder), "--image", photo, "--out", str(tmp_path / "p.png"))
    assert f"--model: no chat template in {folder}" in line


def test_broken_chat_template_is_one_line(
    plain: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system turn first') }}")
    line = refused(capsys, "demo", "--model", str(folder), "--image", photo, "--out", str(tmp_path / "p.png"))
    assert "--model: its processor refuses" in line
    assert "system turn first" in line


def test_what_the_processor_cuts_off_is_not_shown(tmp_path: Path) -> None:
    """The model gets the same pixels from the cut image."""
    gradient = np.zeros((48, 96, 3), dtype=np.uint8)
    gradient[..., 0] = np.arange(96)[None, :]
    gradient[..., 1] = 4 * np.arange(48)[:, None]
    image = Image.fromarray(gradient)
    with checkpoint.quiet():
        found = checkpoint.load(saved.llava(tmp_path / "model", crop=True), torch.device("cpu"))
    seen = found.seen(image)
    assert seen.size == (48, 48)
    assert seen.getpixel((0, 0)) == (24, 0, 0)
    whole, cut = (found.processor.image_processor(p, return_tensors="pt")["pixel_values"] for p in (image, seen))
    torch.testing.assert_close(whole[..., 2:-2], cut[..., 2:-2], atol=0.05, rtol=0)


def test_images_without_cutting_are_shown_whole() -> None:
    image = Image.new("RGB", (50, 20))
    images = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    for kind, crops, size in (("llava", False, (50, 20)), ("llava_next", True, (50, 20)), ("llava", True, (20, 20))):
        images.do_center_crop = crops
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        made = checkpoint.Checkpoint(model, SimpleNamespace(image_processor=images))
        assert made.seen(image).size == size
    images.size = {"height": 48, "width": 48}
    assert made.seen(image).size == (25, 10)
