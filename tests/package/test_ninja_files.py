"""What ninja makes of the build files of setup.py and the emulator where every path has a space and a dollar."""

import shlex
import subprocess
from pathlib import Path

import pytest

import emulator.build
from testing.setup_file import setup_module

# Takes down its words, one a line, and writes what it is asked to write; it also answers as nvcc does.
COMPILER = r"""#!/bin/sh
printf '%s\n' "$@" '' >> "$0.calls"
for word; do
  case $word in
    -dryrun) echo "#$ TOP=$(dirname "$0")" >&2; exit;;
    --version) echo "release 13.0, V13.0.88"; exit;;
  esac
  if [ "$before" = -o ]; then echo made > "$word"; fi
  before=$word
done
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "a b$c"
    folder.mkdir()
    return folder


def program(file: Path) -> Path:
    file.write_text(COMPILER)
    file.chmod(0o755)
    return file


def source(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def calls(compiler: Path) -> list[list[str]]:
    """The words of every call."""
    *each, _ = Path(f"{compiler}.calls").read_text().split("\n\n")
    return [call.split("\n") for call in each]


def compiled(words: list[list[str]]) -> set[str]:
    """The sources in the calls that compile."""
    return {call[call.index("-c") + 1] for call in words if "-c" in call}


def test_setup_compiles_and_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_module()
    csrc, build, target = place / "csrc", place / "build", place / "package" / "_C.abi3.so"
    monkeypatch.setattr(setup, "CSRC", csrc)
    monkeypatch.setattr(setup, "torch_folder", lambda: place / "torch")
    monkeypatch.setenv("CXXFLAGS", shlex.join([f"-I{place / 'mine'}"]))
    monkeypatch.setenv("LDFLAGS", shlex.join([f"-L{place / 'mine'}"]))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    cxx, nvcc = program(place / "c++"), program(place / "nvcc")
    sources = {source(csrc / name) for name in ("ops.cpp", "cpu/nms.cpp", "cpu/simd/nms.cpp", "cuda/nms.cpp")}
    kernel = source(csrc / "cuda" / "nms.cu")
    for folder in (build, target.parent):
        folder.mkdir()
    command = setup.prepared(build, target, [str(cxx)], str(nvcc), [kernel])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert target.read_text() == "made\n"
    *compilations, link = calls(cxx)
    assert compiled(compilations) == {str(file) for file in sources}
    given = {f"-I{csrc}", f"-I{csrc / 'include'}", f"-I{place / 'mine'}", str(place / "torch" / "include")}
    assert all(given <= {*call} for call in compilations)
    assert {f"-L{place / 'torch' / 'lib'}", f"-L{place / 'lib64'}", f"-L{place / 'mine'}", str(target)} <= {*link}
    assert "cuda/nms.cu.o" in link
    assert compiled(calls(nvcc)) >= {str(kernel)}
    assert "no work to do" in subprocess.run(command, capture_output=True, text=True).stdout


def test_the_emulator_compiles_and_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator.build, "ROOT", place)
    monkeypatch.setattr(emulator.build, "CSRC", place / "csrc")
    monkeypatch.setattr(emulator.build, "torch_folder", lambda: place / "torch")
    cxx = program(place / "c++")
    monkeypatch.setenv("CXX", shlex.quote(str(cxx)))
    kernel = source(place / "csrc" / "cuda" / "nms.cu")
    target = emulator.build.compiled("emulator", "module.so", [kernel], ["--coverage"], [f"-L{place / 'torch'}"])
    assert target == place / "build" / "emulator" / "module.so"
    assert target.read_text() == "made\n"
    compilation, link = calls(cxx)
    assert compiled([compilation]) == {str(kernel)}
    assert {f"-I{place / 'csrc'}", str(place / "torch" / "include"), "--coverage"} <= {*compilation}
    assert {"csrc-cuda-nms.cu.o", str(target), f"-L{place / 'torch'}"} <= {*link}
