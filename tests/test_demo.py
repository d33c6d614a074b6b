"""The command line: `info` needs nothing beyond the package, `demo` draws the panel and reports both timings."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import tokenprune_kernels as tp
from tokenprune_kernels.__main__ import EXTRAS, main

NAMES = ("coast", "sts", "adafv", "zspaprune", "adaptprune", "fastv", "divprune", "random")
MISSING = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
if not MISSING:
    import numpy as np
    from PIL import Image

    from tokenprune_kernels.demo import features, panel, photo, run

needs_extras = pytest.mark.skipif(bool(MISSING), reason=f"the demo's extras are not installed: {', '.join(MISSING)}")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a call that must end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def default_inputs():
    picture = photo.load(None)
    square, focus = photo.crop_square(picture, photo.parse_focus(None, picture.size, default_photo=True))
    return features.inputs(square, focus, torch.device("cpu"))


def test_info_prints_the_configuration(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    tp.show_config()
    assert printed == capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed


@pytest.mark.parametrize("module", EXTRAS)
def test_missing_extra_is_one_line_and_info_still_works(module, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.split(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("tokenprune_kernels.demo"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    line = _refused(capsys, "demo")
    assert line.startswith(f"tokenprune demo: {EXTRAS[module]} is not installed")
    assert "tokenprune_kernels[demo]" in line
    assert main(["info"]) == 0


def test_wrong_command_is_one_line(capsys):
    assert _refused(capsys).startswith("tokenprune: ")
    assert _refused(capsys, "prune").startswith("tokenprune: ")
    assert _refused(capsys, "demo", "--colour", "red").startswith("tokenprune")


@needs_extras
def test_command_shows_every_method(tmp_path):
    """As a user calls it: a process of its own, with the output in a pipe."""
    out = tmp_path / "panel.png"
    done = subprocess.run(
        [sys.executable, "-m", "tokenprune_kernels", "demo", "--out", str(out), "--repeats", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if "576 -> 128" in line}
    assert tuple(rows) == NAMES
    for name, row in rows.items():
        # A near-tie may fall differently in float32; then the reason must be given.
        assert "100.0%" in row or f"\n{name}: " in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == [f"{name}: done" for name in NAMES]
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == panel.panel_size(1 + len(NAMES))


@needs_extras
def test_own_picture_one_method_ratio_and_focus(tmp_path, capsys):
    path, out = tmp_path / "own.jpg", tmp_path / "own.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    arguments = ["--image", str(path), "--method", "fastv,random", "--keep", "0.5", "--focus", "0.9,0.1"]
    assert main(["demo", *arguments, "--out", str(out), "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "fastv" in printed
    assert "coast" not in printed
    assert printed.count("576 -> 288") == 2
    with Image.open(out) as image:
        assert image.size == panel.panel_size(3)


@needs_extras
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "{tmp}/none.png"], "no such file"),
        (["--image", "{tmp}"], "not a file"),
        (["--image", "{tmp}/text.png"], "not a readable picture"),
        (["--image", "{tmp}/cut.png"], "not a readable picture"),
        (["--keep", "577"], "at most all 576 tokens, got 577"),
        (["--keep", "0"], "at least 1"),
        (["--keep", "-3"], "at least 1"),
        (["--keep", "0.0"], "at least 1"),
        (["--keep", "1.5"], "at most all 576"),
        (["--keep", "many"], "expected a count"),
        (["--keep", "1.e999"], "expected a count"),
        (["--method", "coats"], "unknown method 'coats'"),
        (["--method", ""], "unknown method ''"),
        (["--focus", "1.2,0.5"], "outside the photo"),
        (["--focus", "451,-1"], "outside the photo"),
        (["--focus", "452,10"], "outside the photo, which is 451 x 300"),
        (["--focus", "nan,nan"], "outside the photo"),
        (["--focus", "0.5,200"], "two fractions"),
        (["--focus", "here"], "expected X,Y"),
        (["--focus", "1,2,3"], "expected X,Y"),
        (["--out", "{tmp}/panel.jpg"], "ends in .png"),
        (["--out", "{tmp}/no/panel.png"], "no such folder"),
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "two"], "--repeats"),
        (["--seed", "-1"], "--seed"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, says, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "panel.png")]
    line = _refused(capsys, "demo", *arguments, *out)
    assert line.startswith("tokenprune demo: ")
    assert says in line
    assert not (tmp_path / "panel.png").exists()


@needs_extras
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 128, 576])
def test_methods_agree_with_the_references(name, k, default_inputs):
    """In float64, where a near-tie would have to be closer than 1e-15."""
    result = run.compare(name, features.Inputs(*(t.double() for t in default_inputs)), k, 0, 1)
    assert result.kept.tolist() == sorted(set(result.kept.tolist()))
    assert len(result.kept) == k
    assert result.kept.tolist() == result.by_reference.tolist()


@needs_extras
def test_disagreement_is_reported(default_inputs):
    """One token exchanged by hand: the share falls, and the float64 run tells whose choice it was."""
    result = run.compare("divprune", default_inputs, 10, 0, 1)
    dropped = min(set(range(576)) - set(result.kept.tolist()))
    changed = result._replace(kept=torch.cat((torch.tensor([dropped]), result.by_reference[1:])))
    assert run.share(changed.kept, changed.by_reference) == pytest.approx(0.9)
    note = run.explain("divprune", default_inputs, 10, 0, changed)
    assert note is not None
    assert note.startswith("divprune: 1 of 10 tokens differ")
    assert run.explain("divprune", default_inputs, 10, 0, changed._replace(kept=changed.by_reference)) is None


@needs_extras
def test_missing_kernels_are_reported(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(tp, "config", lambda: {"backends": {"cpu": None}})
    assert run.without_kernels(cpu) is None
    monkeypatch.setattr(tp, "config", lambda: {"backends": {"cpu": "no compiler"}})
    assert "no compiler" in run.without_kernels(cpu)


@needs_extras
def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert tuple(run.METHODS) == NAMES
    assert all(name in printed for name in NAMES)


@needs_extras
def test_descriptors_are_deterministic_and_of_length_one():
    image = photo.load(None).crop((75, 0, 375, 300))
    first, second = features.descriptors(image), features.descriptors(image)
    assert first.shape == (4, 576, 16)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(4, 576))


@needs_extras
def test_uniform_picture_has_zero_descriptors():
    assert features.descriptors(Image.new("RGB", (50, 50), (120, 80, 40))).count_nonzero() == 0


@needs_extras
def test_orientation_tells_directions_apart():
    """Vertical stripes left, horizontal stripes right: like goes with like in the orientation head."""
    pixels = np.zeros((features.SIDE, features.SIDE, 3), dtype=np.uint8)
    pixels[:, : features.SIDE // 2][:, ::4] = 255
    pixels[:, features.SIDE // 2 :][::4] = 255
    heads = features.descriptors(Image.fromarray(pixels))[2]
    token = torch.arange(576)
    inner = (token // 24 > 0) & (token // 24 < 23)
    left, right = (heads[inner & side] for side in ((token % 24 < 11) & (token % 24 > 0), token % 24 > 12))
    assert (left @ left.mT).mean() > 0.8
    assert (left @ right.mT).mean() < -0.8


@needs_extras
@pytest.mark.parametrize(("focus", "centre"), [((0.0, 0.0), 0), ((1.0, 1.0), 575), ((0.5, 0.25), 6 * 24 + 12)])
def test_question_ends_with_the_focus(focus, centre):
    question = features.question_patches(focus)
    assert question[-1] == centre
    assert len(set(question.tolist())) == len(question) == (13 if centre == 156 else 6)


@needs_extras
@pytest.mark.parametrize("size", [(600, 400), (400, 600), (300, 300), (1000, 10)])
@pytest.mark.parametrize("at", [(0.0, 0.0), (0.5, 0.5), (0.97, 0.4), (1.0, 1.0)])
def test_square_contains_the_focus(size, at):
    focus = (at[0] * size[0], at[1] * size[1])
    square, inside = photo.crop_square(Image.new("RGB", size), focus)
    assert square.size == (min(size), min(size))
    assert all(0 <= fraction <= 1 for fraction in inside)
    if at == (0.5, 0.5):
        assert inside == (0.5, 0.5)


@needs_extras
def test_deep_grey_picture_is_not_clipped(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = np.asarray(photo.load(str(tmp_path / "deep.png")))
    assert (loaded == np.arange(256).reshape(16, 16, 1)).all()


@needs_extras
def test_focus_in_fractions_and_pixels():
    assert photo.parse_focus("0.5,0.25", (600, 400), default_photo=True) == (300, 100)
    assert photo.parse_focus("300,100", (600, 400), default_photo=True) == (300, 100)
    assert photo.parse_focus("1,1", (600, 400), default_photo=True) == (1, 1)
    assert photo.parse_focus(None, (600, 400), default_photo=False) == (300, 200)


@needs_extras
def test_keep_as_count_and_ratio():
    assert [run.parse_keep(text) for text in ("1", "128", "576", "0.2222", "0.5", "1.0")] == [
        1,
        128,
        576,
        128,
        288,
        576,
    ]


@needs_extras
def test_panel_shows_kept_patches_and_dims_the_rest():
    square = Image.new("RGB", (100, 100), (200, 60, 20))
    tiles = [panel.Tile("Photo", "", None), panel.Tile("some", "", [0, 25, 575])]
    drawn = panel.draw(square, (0.5, 0.5), "heading", "subtitle", tiles)
    assert drawn.size == panel.panel_size(2)
    left, top = panel.GAP + panel.TILE + panel.GAP, panel.HEADER + panel.CAPTION
    bright = []
    for token in range(576):
        row, column = divmod(token, 24)
        pixel = drawn.getpixel((left + column * panel.CELL + panel.CELL // 2, top + row * panel.CELL + panel.CELL // 2))
        if pixel == (200, 60, 20):
            bright.append(token)
        else:
            assert max(pixel) < 80
    assert bright == [0, 25, 575]


@needs_extras
def test_panel_text_fits_its_column():
    assert panel.text_width(run.SUBTITLE, panel.SUBTITLE_SIZE) <= panel.panel_size(2)[0] - 2 * panel.GAP
    for method in run.METHODS.values():
        assert panel.text_width(method.note, panel.NOTE_SIZE) <= panel.TILE
        assert panel.text_width(f"{method.title}: 576 kept", panel.TITLE_SIZE) <= panel.TILE
