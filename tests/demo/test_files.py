"""What the demo reads and writes: checkpoints in the hub's cache, and the page."""

from pathlib import Path

import pytest

from tests.demo.case import MISSING, demo

if MISSING:
    pytest.skip(f"the demo's extras are not installed: {', '.join(MISSING)}", allow_module_level=True)

from tokenprune_kernels.demo import example


def test_a_checkpoint_of_the_hub_is_found_in_its_cache(
    plain: Path, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout of the cache is the hub's: a reference to a commit, and a snapshot of its files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    stored, commit = tmp_path / "models--owner--name", "0" * 40
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    (stored / "snapshots").mkdir()
    (stored / "snapshots" / commit).symlink_to(plain)
    arguments = ["--image", photo, "--question", "a cat", "--method", "random", "--out", str(tmp_path / "p.png")]
    assert "36 -> 8" in demo(capsys, Path("owner/name"), *arguments)
    assert example.model_folder("owner/name") == stored / "snapshots" / commit


def test_a_folder_comes_before_an_id_of_the_hub(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    assert example.model_folder("owner/name") == Path("owner/name")


def test_page_of_all_methods(plain: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    page = tmp_path / "kept.html"
    files = ["--out", str(tmp_path / "p.png"), "--html", str(page)]
    printed = demo(capsys, plain, "--image", photo, "--question", "a cat", "--method", "divprune,fastv", *files)
    assert printed.endswith(f"page: {page}\n")
    text = page.read_text()
    assert "<title>Visual tokens kept by DivPrune, FastV</title>" in text
    assert text.count('class="on"') == 8
