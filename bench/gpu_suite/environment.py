"""Where the run happens: GPU, driver, compilers, torch, commit. Nothing here names the machine or its user."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from testing.machine import commit, first_lines, processor

from .run import Run

PACKAGES = (
    "torch", "triton", "torchvision", "pytest", "hypothesis", "ninja", "setuptools", "pybind11", "numpy",
    "torch_fps", "torch_quickfps_cu130", "flash_colreduce",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu,utilization.gpu"
TORCH = """
import json, torch
found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cuda_available": torch.cuda.is_available()}
if found["cuda_available"]:
    p = torch.cuda.get_device_properties(0)
    found.update(gpu=p.name, count=torch.cuda.device_count(), capability=[p.major, p.minor],
                 sms=p.multi_processor_count, memory=p.total_memory, l2=getattr(p, "L2_cache_size", None))
print("FOUND", json.dumps(found))
"""


def find_program(name: str) -> str | None:
    """On PATH, or where a CUDA toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(run: Run) -> dict[str, Any]:
    code, output = run.command([sys.executable, "-c", TORCH], seconds=60)
    found = next((json.loads(line[6:]) for line in output.splitlines() if line.startswith("FOUND ")), None)
    programs = {name: find_program(name) for name in ("nvcc", "compute-sanitizer", "ncu")}
    facts = {
        "torch": found or {"error": output[-500:], "code": code},
        "smi": first_lines(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
        **{name: first_lines([found, "--version"], 2) if found else None for name, found in programs.items()},
        "compiler": first_lines(["g++", "-dumpfullversion"]),
        "python": platform.python_version(),
        "packages": {name: installed for name in PACKAGES if (installed := version(name))},
        "cpu": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    gpu = (found or {}).get("gpu")
    reason = None if gpu or run.dry else "torch finds no CUDA device"
    return {"status": "failed" if reason else "passed", "reason": reason, "summary": {"gpu": gpu}, "facts": facts}
