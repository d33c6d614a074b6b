"""The package in the form that the kernel hub loads: a repository with one folder per build variant.

usage: python -m scripts.hub [--cuda] [--out build/hub]

    kernels.get_local_kernel(Path("build/hub"))     # the module, under a name of its own

The variant for CPUs is built without CUDA code; `--cuda` builds that for the CUDA of the compiler here.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from testing import ROOT
from testing.setup_file import setup_module

PACKAGE = ROOT / "tokenprune_kernels"
NAME = "tokenprune-kernels"
VERSION = 1  # of the interface: docs/contract.md may only grow while it stays
STABLE_ABI = "torch-stable-abi210"  # setup.py compiles for torch 2.10
READ_BUILD_INFO = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
print(importlib.util.module_from_spec(spec).build_info())
"""


def sources() -> dict[str, Path]:
    """The Python files by their place in the variant, and what they read; the references are a folder of their own in
    the checkout."""
    found = {
        str(f.relative_to(PACKAGE)): f
        for kind in ("*.py", "*.jinja")
        for f in PACKAGE.rglob(kind)
        if "reference" not in f.parts
    }
    return found | {f"reference/{f.name}": f for f in (ROOT / "python_ref").glob("*.py")}


def build_info(library: Path) -> dict[str, Any]:
    """What a compiled library says of itself; in a process of its own, because loading it defines the ops."""
    done = subprocess.run([sys.executable, "-c", READ_BUILD_INFO, library], capture_output=True, text=True, check=True)
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def backend(info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """How the variant's name spells what it is compiled for, and how its metadata do."""
    if not info.get("cuda_architectures"):
        return "cpu", {"type": "cpu"}
    runtime = info["cuda_runtime"]
    architectures = [name.removesuffix("+PTX") for name in info["cuda_architectures"].split(";")]
    return f"cu{runtime // 1000}{runtime % 1000 // 10}", {"type": "cuda", "archs": architectures}


def write_variant(out: Path, library: Path, compiled_for: tuple[str, dict[str, Any]]) -> Path:
    """One folder under out/build; what was there before is gone."""
    spelled, described = compiled_for
    machine = f"{platform.machine()}-{platform.system().lower()}"
    folder = out / "build" / f"{STABLE_ABI}-{spelled}-{machine}"
    shutil.rmtree(folder, ignore_errors=True)
    files = sources() | {"_C.abi3.so": library, "py.typed": PACKAGE / "py.typed"}
    digest = hashlib.sha256()
    for name in sorted(files):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[name], target)
        digest.update(name.encode() + target.read_bytes())
    identity = f"_{NAME.replace('-', '_')}_{spelled}_{digest.hexdigest()[:12]}"
    metadata = {
        "id": identity, "name": NAME, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
        "backend": described,
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return folder


def variant(cuda: bool) -> tuple[Path, dict[str, str]]:
    """Where what is given away is compiled, apart from the checkout's own library, and the switches for setup.py."""
    switches = {"TOKENPRUNE_CUDA": str(int(cuda)), "TOKENPRUNE_CPU": "1"}
    if cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # not the GPU of this machine alone
        switches["TORCH_CUDA_ARCH_LIST"] = setup_module().DEFAULT_ARCHITECTURES
    return ROOT / "build" / ("hub-cuda" if cuda else "hub-cpu"), os.environ | switches


def build(cuda: bool) -> Path:
    """The library of a variant."""
    place, environment = variant(cuda)
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={place / 'lib'}"]
    subprocess.run([*command, f"--build-temp={place / 'temp'}"], cwd=ROOT, env=environment, check=True)
    return place / "lib" / PACKAGE.name / "_C.abi3.so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="the variant with CUDA kernels (default: that for CPUs)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    options = parser.parse_args()
    library = build(options.cuda)
    folder = write_variant(options.out, library, backend(build_info(library)))
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
