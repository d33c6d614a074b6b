"""The package in the kernel hub's form: it loads under another name, whole, and beside no second copy."""

import json
from pathlib import Path

import pytest

import tokenprune_kernels as tp
from scripts import hub
from testing import ROOT
from testing.process import printed, search_path

LIBRARY = ROOT / "tokenprune_kernels" / "_C.abi3.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="no compiled library was built in the checkout")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the library of the checkout, as if it were for CPUs alone: CI's has CUDA code."""
    out = tmp_path_factory.mktemp("hub")
    hub.write_variant(out, LIBRARY, ("cpu", {"type": "cpu"}))
    return out


def variant(repository: Path) -> Path:
    (folder,) = (repository / "build").iterdir()
    return folder


def test_a_variant_has_every_module_and_the_references(repository: Path) -> None:
    folder = variant(repository)
    assert folder.name.startswith("torch-stable-abi210-cpu-")

    def files(root: Path) -> set[str]:
        return {str(f.relative_to(root)) for kind in ("*.py", "*.jinja") for f in root.rglob(kind)}

    here, there = files(ROOT / "tokenprune_kernels"), files(folder)
    assert {name for name in here if not name.startswith("reference/")} <= there
    assert {f"reference/{f.name}" for f in (ROOT / "python_ref").glob("*.py")} <= there


def test_the_name_of_a_variant_changes_with_its_files(repository: Path, tmp_path: Path) -> None:
    library = tmp_path / "other.so"
    library.write_bytes(LIBRARY.read_bytes() + b"\0")
    other = hub.write_variant(tmp_path, library, ("cpu", {"type": "cpu"}))
    names = {json.loads((folder / "metadata.json").read_text())["id"] for folder in (other, variant(repository))}
    assert len(names) == 2
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(
    ("info", "spelled", "described"),
    [
        ({"cuda_architectures": ""}, "cpu", {"type": "cpu"}),
        (
            {"cuda_architectures": "8.0;9.0a;12.0+PTX", "cuda_runtime": 13000},
            "cu130",
            {"type": "cuda", "archs": ["8.0", "9.0a", "12.0"]},
        ),
    ],
)
def test_a_variant_says_what_it_is_compiled_for(info: dict, spelled: str, described: dict) -> None:
    assert hub.backend(info) == (spelled, described)


def test_a_library_tells_how_it_was_built() -> None:
    assert hub.build_info(LIBRARY) == json.loads(json.dumps(hub.build_info(LIBRARY)))
    assert "cuda_architectures" in hub.build_info(LIBRARY)


def test_the_hub_loads_it(repository: Path) -> None:
    pytest.importorskip("kernels", reason="kernels, the hub's loader, is not installed")
    told = printed(ROOT / "examples" / "hub.py", repository, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert f"{tp.__version__} from the hub's form keeps [[1, 2]]" in told
    assert "'cpu': None" in told  # the compiled kernels serve


SECOND = """
import importlib.util, sys
import tokenprune_kernels
place = {place!r}
spec = importlib.util.spec_from_file_location("another_copy", place + "/__init__.py")
sys.modules["another_copy"] = module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except ImportError as error:
    print(error)
import torch
print(tokenprune_kernels.select_topk(torch.tensor([[1.0, 3.0]]), 1)[0].tolist())
"""


def test_a_second_copy_is_refused_by_name(repository: Path) -> None:
    """It ended in a segmentation fault."""
    told = printed("-c", SECOND.format(place=str(variant(repository))), PYTHONPATH=search_path(ROOT))
    assert f"tokenprune_kernels {tp.__version__} in {ROOT / 'tokenprune_kernels'} has defined" in told
    assert f"in {variant(repository).resolve()}: import only one of them" in told
    assert "[[1]]" in told
