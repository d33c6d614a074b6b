"""One wheel, many torch versions: builds it once, then loads and runs it in throw-away environments.

Every environment gets a complete torch from the configured index, CUDA libraries included where that is what the index
has (a CUDA build of torch does not import without them): some 7 GB each, one at a time, removed again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from testing import ROOT

from .packages import newest, pip

GIGABYTES_FREE = 15
ABI_AUDIT = [sys.executable, "-c", "import sys; from torch_abi_audit.cli import main; sys.exit(main())"]


def build_wheel(folder: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def symbol_floors(library: Path) -> str:
    """The newest glibc and libstdc++ symbol versions the library asks for."""
    table = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    floors = []
    for family in ("GLIBC", "GLIBCXX", "CXXABI"):
        versions = re.findall(rf"\b{family}_([\d.]+)", table)
        newest = max(versions, key=lambda v: [int(n) for n in v.split(".")], default="none")
        floors.append(f"{family} {newest}")
    return ", ".join(floors)


def check_torch(version: str, python: str, wheel: Path) -> bool:
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < GIGABYTES_FREE:
        print(f"torch {version}: not tried, {free:.0f} GB free of the {GIGABYTES_FREE} GB that it may need")
        return False
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tokenprune-abi-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(Path(folder, "bin", "python"))
        try:
            pip("install", "--no-cache-dir", f"torch=={version}", "numpy", python=inside)
            pip("install", "--no-deps", wheel, python=inside)
        except RuntimeError as error:
            print(f"torch {version}: {error}")
            return False
        # -I: neither this checkout nor the caller's PYTHON* variables are visible.
        ran = subprocess.run([inside, "-I", str(ROOT / "scripts" / "abi_smoke.py")], cwd=folder, text=True)
    print(
        f"torch {version}: {'ok' if ran.returncode == 0 else 'FAILED'} in {time.monotonic() - began:.0f} s", flush=True
    )
    return ran.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torch", nargs="*", default=["2.10.0", "2.13.0", "newest"], help="versions to try")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenprune-wheel-") as folder:
        wheel = build_wheel(Path(folder))
        print(f"built {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract("tokenprune_kernels/_C.abi3.so", folder))
        print(f"needs {symbol_floors(library)}", flush=True)
        good = subprocess.run([*ABI_AUDIT, "--check", "both", str(library)]).returncode == 0
        for version in dict.fromkeys(newest("torch") if v == "newest" else v for v in arguments.torch):
            good = check_torch(version, arguments.python, wheel) and good
    print("the ABI holds" if good else "the ABI check FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
