"""The build: switches and their errors, what a wheel and an sdist contain, the installation without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from testing import ROOT
from testing.process import printed
from testing.setup_file import setup_module

SWITCHES = ("TOKENPRUNE_CPU", "TOKENPRUNE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX", "CXXFLAGS", "LDFLAGS")
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of its switches set."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return setup_module()


def setup_py(folder: Path, *commands: str, **switches: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py so that everything it writes goes to `folder`, with these switches and no others."""
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES} | switches
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), *commands]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def build_wheel(folder: Path, **switches: str) -> Path:
    folders = ["build", "--build-base", str(folder / "build"), "--build-temp", str(folder / "objects")]
    done = setup_py(folder, *folders, "bdist_wheel", "-d", str(folder), "-b", str(folder / "wheel"), **switches)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def python_files() -> set[str]:
    """Where the sources of this checkout and their templates belong in a wheel."""
    package = ROOT / "tokenprune_kernels"
    files = {str(f.relative_to(ROOT)) for kind in ("*.py", "*.jinja") for f in package.rglob(kind)}
    return files | {f"tokenprune_kernels/reference/{f.name}" for f in (ROOT / "python_ref").glob("*.py")}


def test_architectures_become_gencode_flags(build: ModuleType) -> None:
    assert build.nvcc_architectures(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def program(file: Path, says: str) -> Path:
    """An executable that answers with this, whatever it is asked."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("value", [None, "", " ; "])
@pytest.mark.parametrize(
    ("gpus", "chosen"),
    [
        (None, ["8.0", "9.0a", "10.0+PTX"]),
        ("No devices were found", ["8.0", "9.0a", "10.0+PTX"]),
        ("7.5", ["8.0", "9.0a", "10.0+PTX"]),
        ("9.0\n9.0", ["9.0a"]),
        ("12.0\n7.5\n8.9", ["8.9", "12.0"]),
    ],
)
def test_without_a_list_the_gpus_here_are_built_for(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    value: str | None,
    gpus: str | None,
    chosen: list,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: gpus and str(program(tmp_path / name, gpus)))
    if value is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert build.architectures() == chosen


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("8.0 9.0a;12.0+PTX", ["8.0", "9.0a", "12.0+PTX"]),
        ("80;sm_90a,9.0;120+PTX;100f", ["8.0", "9.0a", "9.0", "12.0+PTX", "10.0f"]),
        ("Hopper", ["9.0a"]),
        ("Ampere;8.6;Blackwell+PTX", ["8.0", "8.6", "10.0", "12.0+PTX"]),
        ("native;8.0", ["8.9", "8.0"]),
    ],
)
def test_architectures_are_understood_as_people_write_them(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, meaning: list
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    monkeypatch.setattr(build, "native_architectures", lambda: ["8.9"])
    assert build.architectures() == meaning


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *(
            (value, f"cannot read '{re.escape(value)}'")
            for value in ("hopper", "compute_90", "9", "9.0+ptx", "8.0++PTX")
        ),
        ("7.5", r"the kernels need 8.0 \(Ampere\) or newer, got '7.5'"),
        ("8.0;native", "native, but nvidia-smi shows no GPU of capability 8.0 or newer"),
    ],
)
def test_unreadable_architectures_are_named(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    monkeypatch.setattr(build, "native_architectures", list)
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST.*{message}"):
        build.architectures()


def test_cuda_is_chosen_by_switch_sources_torch_and_nvcc(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, nvcc = [tmp_path / "toy.cu"], program(tmp_path / "bin" / "nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path)
    (tmp_path / "version.py").write_text("cuda = None")
    assert build.cuda_compiler(sources) is None
    (tmp_path / "version.py").write_text("cuda = '13.0'")
    assert build.cuda_compiler(sources) == str(nvcc)
    (tmp_path / "version.py").write_text("cuda = None")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert build.cuda_compiler(sources) == str(nvcc)
    assert build.cuda_compiler([]) is None
    monkeypatch.setenv("TOKENPRUNE_CUDA", "0")
    assert build.cuda_compiler(sources) is None
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("TOKENPRUNE_CUDA", "1")
    assert build.cuda_compiler(sources) == str(nvcc)
    with pytest.raises(SystemExit, match="no CUDA sources"):
        build.cuda_compiler([])
    nvcc.unlink()
    with pytest.raises(SystemExit, match=re.escape(f"nvcc was not found in CUDA_HOME={tmp_path}")):
        build.cuda_compiler(sources)
    monkeypatch.setenv("TOKENPRUNE_CUDA", "auto")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert build.cuda_compiler(sources) is None


@pytest.mark.parametrize(("release", "flags"), [("13.0", ["--compress-mode=size"]), ("12.9", [])])
def test_machine_code_is_small_where_every_driver_of_the_runtime_unpacks_it(
    build: ModuleType, tmp_path: Path, release: str, flags: list
) -> None:
    assert (
        build.compression(str(program(tmp_path / "nvcc", f"compilation tools, release {release}, V{release}.88")))
        == flags
    )


def test_the_compiler_may_be_a_command(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"'{sys.executable}' -m compiler")
    assert build.find_compiler() == [sys.executable, "-m", "compiler"]
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.find_compiler() is None


def test_vector_sources_are_compiled_once_per_capability(build: ModuleType) -> None:
    lines = build.ninja_file(Path("/a b/_C.abi3.so"), ["c++"], None, []).splitlines()
    flags = {line: lines[i + 1] for i, line in enumerate(lines) if re.match(r"build .*: cxx ", line)}
    sources = [source for source in (ROOT / "csrc").rglob("*.cpp") if source.parent.name != "cuda"]
    assert not [line for line in flags if "csrc/cuda" in line], "without nvcc, the bindings have nothing to call"
    for source in sources:
        mine = [extra for line, extra in flags.items() if line.endswith(f": cxx {build.path(source)}")]
        if source.parent.name == "simd":
            assert len(mine) == len(build.capabilities())
            assert all("-ffp-contract=fast" in extra for extra in mine)
        else:
            assert len(mine) == 1
            assert "-ffp-contract=off" in mine[0]
            assert "-mavx" not in mine[0]
    assert any(line.startswith("build /a$ b/_C.abi3.so: link ") for line in lines)


def test_wheel_without_a_compiler_is_pure_and_works(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="/nonexistent/g++")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == python_files() | {"tokenprune_kernels/py.typed"}
    program = (
        "import torch, tokenprune_kernels as tp\n"
        "print(tp.__file__, tp.reference.__file__, tp.config()['backends']['cpu'], sep='\\n')\n"
        "print(tp.select_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2)[0].tolist())"
    )
    # -S: the import hook of this checkout's editable installation stays away, which would find the library.
    folders = [str(tmp_path / "installed"), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    told = printed("-S", "-c", program, cwd=tmp_path, PYTHONPATH=os.pathsep.join(folders))
    package, reference, reason, kept = told.splitlines()
    assert Path(package).is_relative_to(tmp_path / "installed")
    assert Path(reference).is_relative_to(tmp_path / "installed")
    assert "no compiled library was built" in reason
    assert kept == "[[1, 2]]"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_compiled_wheel_has_one_abi3_library_and_no_sources(tmp_path: Path) -> None:
    if OBJECTS.exists():  # of the build in place, for the same architectures: only the link is left to do
        shutil.copytree(OBJECTS, tmp_path / "objects")
    same = {name: os.environ[name] for name in ("TOKENPRUNE_CUDA", "TORCH_CUDA_ARCH_LIST") if name in os.environ}
    wheel = build_wheel(tmp_path, TOKENPRUNE_CPU="1", **same)
    tag = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-cp310-abi3-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert names == python_files() | {"tokenprune_kernels/py.typed", "tokenprune_kernels/_C.abi3.so"}
    assert len(licences) == 1


def test_sdist_has_everything_that_a_build_and_the_tests_need(tmp_path: Path) -> None:
    done = setup_py(tmp_path, "sdist", "-d", str(tmp_path), CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "python_ref", "tokenprune_kernels", "testing", "tests", "emulator", "bench", "studies",
               "scripts")  # fmt: skip
    wanted = {
        str(f.relative_to(ROOT))
        for folder in folders
        for f in (ROOT / folder).rglob("*")
        if f.is_file() and "__pycache__" not in f.parts and not f.name.startswith(".") and f.suffix != ".so"
    }
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"TOKENPRUNE_CUDA": "yes"}, "TOKENPRUNE_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"TOKENPRUNE_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "nvcc was not found in CUDA_HOME=/nonexistent"),
        ({"TOKENPRUNE_CUDA": "1", "TOKENPRUNE_CPU": "0"}, "TOKENPRUNE_CUDA=1 contradicts TOKENPRUNE_CPU=0"),
        ({"TOKENPRUNE_CPU": "1", "CXX": "/nonexistent/g++"}, "/nonexistent/g++ was not found"),
    ],
)
def test_a_demand_that_cannot_be_met_ends_the_build(tmp_path: Path, switches: dict[str, str], message: str) -> None:
    folders = ["build", "--build-base", str(tmp_path / "build")]
    done = setup_py(tmp_path, *folders, **switches)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
