"""Where the run happens: GPU, driver, compilers, torch, commit. Nothing here names the machine or its user."""

import os
import shutil
from importlib.metadata import distributions
from pathlib import Path

from testing.machine import commit, first_lines, processor

from .work import Run, Stage

PACKAGES = (
    "torch", "triton", "torchvision", "pytest", "hypothesis", "ninja", "setuptools", "numpy", "torch-fps",
    "torch-quickfps-cu130", "flash-colreduce",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu,utilization.gpu"
CONFIG = """
import bench.gpu_suite, json, tokenprune_kernels as tp
known = tp.config()
print("FOUND", json.dumps({name: known[name] for name in ("torch", "python", "gpu", "compute capability")}))
"""


def find_program(name: str) -> str | None:
    """On PATH, or where a CUDA toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run(run: Run) -> Stage:
    found, output = run.python(CONFIG, seconds=60)
    programs = {name: find_program(name) for name in ("nvcc", "compute-sanitizer", "ncu")}
    facts = {
        **(found or {"error": output[-500:]}),
        "smi": first_lines(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
        **{name: first_lines([path, "--version"], 2) if path else None for name, path in programs.items()},
        "compiler": first_lines(["g++", "-dumpfullversion"]),
        "packages": {d.name: d.version for d in distributions() if d.name.replace("_", "-") in PACKAGES},
        "cpu": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    gpu = facts.get("gpu")
    reason = None if gpu or run.dry else "torch finds no CUDA device"
    return {"status": "failed" if reason else "passed", "reason": reason, "summary": {"gpu": gpu}, "facts": facts}
