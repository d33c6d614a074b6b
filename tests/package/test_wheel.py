"""`make wheel`: versions, switches, platforms and what it answers; the wheels themselves are a release's business."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts import wheel
from testing import ROOT
from testing.setup_file import setup_module


def made(file: Path, library: bytes = b"code") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tokenprune_kernels/_C.abi3.so", library)
    return file


def test_versions_differ_as_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "nvcc_version", lambda: "13.0.88")
    assert [wheel.local_version(cuda) for cuda in (False, True)] == ["cpu", "cu130"]


@pytest.mark.parametrize("cuda", [False, True])
def test_the_build_is_told_its_version_and_its_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool
) -> None:
    """Without named architectures the kernels are those for everybody, whatever GPU is here."""
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], cwd: Path, env: dict[str, str], check: bool) -> None:
        assert cwd == ROOT
        assert check
        seen.append((command, env))
        made(tmp_path / "tokenprune_kernels-0.1.0-cp310-abi3-linux_x86_64.whl")

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(wheel, "nvcc_version", lambda: "12.9.1")
    monkeypatch.setattr(subprocess, "run", run)
    assert wheel.build(cuda, tmp_path).parent == tmp_path
    ((command, environment),) = seen
    assert f"--tag-build=+{'cu129' if cuda else 'cpu'}" in command
    assert f"--dist-dir={tmp_path}" in command
    assert (environment["TOKENPRUNE_CPU"], environment["TOKENPRUNE_CUDA"]) == ("1", "1" if cuda else "0")
    assert environment.get("TORCH_CUDA_ARCH_LIST") == (setup_module().DEFAULT_ARCHITECTURES if cuda else None)


def auditwheel(monkeypatch: pytest.MonkeyPatch, status: int, says: str) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "auditwheel", "repair"]
        return subprocess.CompletedProcess(command, status, "", says)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_wheel_is_where_auditwheel_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "a b" / "tokenprune_kernels-0.1.0+cpu-cp310-abi3-manylinux_2_34_x86_64.whl"
    auditwheel(monkeypatch, 0, f"INFO:repairing\nINFO:\nFixed-up wheel written to {written}\n")
    assert wheel.for_manylinux(tmp_path / "some-linux_x86_64.whl") == written


@pytest.mark.parametrize(("status", "says"), [(1, "too-recent versioned symbols"), (0, "nothing to do")])
def test_a_wheel_without_a_platform_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, says: str
) -> None:
    auditwheel(monkeypatch, status, says)
    with pytest.raises(SystemExit, match=f"cannot name a platform for some.whl:\n{says}"):
        wheel.for_manylinux(tmp_path / "some.whl")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The wheels that main() tries, in place of builds and environments; that with CUDA code is found bad."""
    names: list[str] = []

    def build(cuda: bool, out: Path) -> Path:
        return made(tmp_path / f"{'cuda' if cuda else 'cpu'}.whl", library=b"0" * 1_500_000)

    def check(torch: str, python: str, file: Path) -> bool:
        names.append(file.stem)
        return file.stem == "cpu"

    monkeypatch.setattr(wheel, "build", build)
    monkeypatch.setattr(wheel, "for_manylinux", lambda file: file)
    monkeypatch.setattr(wheel, "check_torch", check)
    return names


@pytest.mark.parametrize(
    ("arguments", "nvcc", "kinds", "status"),
    [
        ([], None, ["cpu"], 0),
        ([], "nvcc", ["cpu", "cuda"], 1),
        (["cuda"], None, ["cuda"], 1),
        (["cuda", "cpu"], "nvcc", ["cuda", "cpu"], 1),
    ],
)
def test_every_wheel_is_tried_and_a_bad_one_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tried: list[str],
    arguments: list[str],
    nvcc: str | None,
    kinds: list[str],
    status: int,
) -> None:
    monkeypatch.setattr(wheel, "nvcc", lambda: nvcc)
    monkeypatch.setattr(sys, "argv", ["wheel", *arguments])
    assert wheel.main() == status
    assert tried == kinds
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in told] == [f"{kind}.whl" for kind in kinds]
    assert all(line.endswith("its library 1.5 MB") for line in told)


def test_an_unknown_wheel_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tried: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wheel", "cpu", "rocm"])
    with pytest.raises(SystemExit):
        wheel.main()
    assert "the wheels are cpu and cuda, got cpu rocm" in capsys.readouterr().err
    assert tried == []
