"""Where the run happens: GPU, driver, compilers, torch, commit. Nothing here names the machine or its user."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from . import ROOT
from .run import Run

PACKAGES = (
    "torch", "triton", "torchvision", "pytest", "hypothesis", "ninja", "setuptools", "pybind11", "numpy",
    "torch_cluster", "pytorch3d", "flash_colreduce",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu,utilization.gpu"
TORCH = """
import json, torch
found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cuda_available": torch.cuda.is_available()}
if found["cuda_available"]:
    p = torch.cuda.get_device_properties(0)
    found.update(gpu=p.name, count=torch.cuda.device_count(), capability=[p.major, p.minor], sms=p.multi_processor_count,
                 memory=p.total_memory, l2=getattr(p, "L2_cache_size", None))
print("FOUND", json.dumps(found))
"""


def find_program(name: str) -> str | None:
    """On PATH, or where a CUDA toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def first_lines(words: list[str], count: int = 1, seconds: float = 20) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) if lines else None


def commit() -> str:
    """The commit, also in a copy of the working tree without git: the caller may name it in TOKENPRUNE_COMMIT."""
    if named := os.environ.get("TOKENPRUNE_COMMIT"):
        return named
    if (ROOT / ".git").exists() and (head := first_lines(["git", "rev-parse", "--short=12", "HEAD"])):
        return head + (" with changes" if first_lines(["git", "status", "--porcelain"]) else "")
    return "unknown (no git here; set TOKENPRUNE_COMMIT)"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(run: Run) -> dict[str, Any]:
    import json
    import sys

    code, output = run.command([sys.executable, "-c", TORCH], seconds=60)
    found = next((json.loads(line[6:]) for line in output.splitlines() if line.startswith("FOUND ")), None)
    nvcc, sanitizer = find_program("nvcc"), find_program("compute-sanitizer")
    facts = {
        "torch": found or {"error": output[-500:], "code": code},
        "smi": first_lines(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
        "nvcc": first_lines([nvcc, "--version"], 2) if nvcc else None,
        "compute_sanitizer": first_lines([sanitizer, "--version"], 2) if sanitizer else None,
        "compiler": first_lines(["g++", "-dumpfullversion"]),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "cpu": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    gpu = (found or {}).get("gpu")
    reason = None if gpu or run.dry else "torch finds no CUDA device"
    return {"status": "failed" if reason else "passed", "reason": reason, "summary": {"gpu": gpu}, "facts": facts}
