"""The compiled library: a prebuilt one that runs on this GPU, else built here with this machine's own compilers.

Nothing is installed and nothing is fetched: the ninja file that setup.py writes is run directly, since what setup.py
itself needs of packaging is not on every machine.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from testing import ROOT
from testing.setup_file import setup_module

from .environment import find_program
from .run import Run

LIBRARY = ROOT / "tokenprune_kernels" / "_C.abi3.so"
# Loads the library and runs a kernel: a build for another architecture loads, and fails only at the launch.
PROBE = """
import bench.gpu_suite, json, torch, tokenprune_kernels as tp
from tokenprune_kernels import _registry
info = _registry.build_info()
assert info, f"not loaded: {_registry.load_error()}"
ran = None
if torch.cuda.is_available():
    assert info.get("cuda_architectures"), "it has no CUDA kernels"
    x = torch.rand(3, 100)
    got = tp.score_entropy(x.cuda(), backend="cuda").cpu()
    torch.testing.assert_close(got, tp.reference.score_entropy(x))
    ran = torch.cuda.get_device_name()
print("PROBE", json.dumps({"info": info, "ran_on": ran}))
"""
CAPABILITY = "import torch; print('CAPABILITY', *torch.cuda.get_device_capability())"


def probe(run: Run) -> tuple[dict[str, Any] | None, str]:
    """(what the library says, "") when it serves here, else (None, why not)."""
    if not LIBRARY.exists():
        return None, "there is no prebuilt library"
    code, output = run.command([sys.executable, "-c", PROBE], seconds=90)
    for line in output.splitlines():
        if line.startswith("PROBE "):
            return json.loads(line[6:]), ""
    lines = output.strip().splitlines()
    return None, f"the library does not serve here (code {code}): {lines[-1] if lines else 'no output'}"


def architecture(capability: tuple[int, int]) -> str:
    """The entry of TORCH_CUDA_ARCH_LIST for this GPU alone; Hopper's own instructions need the "a"."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def this_gpu(run: Run) -> str | None:
    _, output = run.command([sys.executable, "-c", CAPABILITY], seconds=60)
    for line in output.splitlines():
        if line.startswith("CAPABILITY "):
            major, minor = line.split()[1:]
            return architecture((int(major), int(minor)))
    return None


def direct_command(settings: dict[str, str], folder: Path, target: Path) -> list[str]:
    """Writes the ninja file that setup.py would write, and returns the command that runs it."""
    with patch.dict(os.environ, settings):
        setup = setup_module()
        compiler = setup.find_compiler()
        if compiler is None:
            raise RuntimeError("no C++ compiler (g++) on this machine")
        sources = sorted((setup.CSRC / "cuda").glob("*.cu"))
        folder.mkdir(parents=True, exist_ok=True)
        # Without ninja: SystemExit that says so.
        command: list[str] = setup.prepared(folder, target, compiler, setup.cuda_compiler(sources), sources)
    return command


def settings(arch: str | None) -> dict[str, str]:
    nvcc = find_program("nvcc")
    chosen = {"MAX_JOBS": str(os.cpu_count() or 2), "TOKENPRUNE_CPU": "1", "TOKENPRUNE_CUDA": "1"}
    if nvcc and "CUDA_HOME" not in os.environ:
        chosen["CUDA_HOME"] = str(Path(nvcc).parent.parent)
    if arch:
        chosen["TORCH_CUDA_ARCH_LIST"] = arch
    return chosen


def resources(folder: Path) -> dict[str, str]:
    """ptxas' report per kernel file: the lines on registers, shared memory and spills."""
    reports = {}
    for log in sorted(folder.glob("**/*.cu.o.log")):
        reports[log.name.removesuffix(".o.log")] = log.read_text(errors="replace")[-20000:]
    return reports


def compile_here(run: Run, steps: list[dict[str, Any]]) -> None:
    chosen = settings(this_gpu(run))
    try:
        command = direct_command(chosen, ROOT / "build" / f"gpu_suite.{platform.machine()}", LIBRARY)
    except (RuntimeError, SystemExit, subprocess.SubprocessError) as error:
        steps.append({"step": "ninja", "code": None, "settings": chosen, "output": str(error)})
        return
    code, output = run.command(command, seconds=600)
    steps.append({"step": "ninja", "code": code, "settings": chosen, "output": output[-4000:]})


def run(run: Run) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    found, reason = probe(run)
    how = "prebuilt"
    if found is None and not run.dry:
        run.say(f"build: {reason}; compiling")
        compile_here(run, steps)
        found, reason = probe(run)
        how = "built here"
    if run.dry:  # the parts that a dry run would not reach
        with contextlib.suppress(RuntimeError, SystemExit):
            command = direct_command({**settings("9.0a"), "TOKENPRUNE_CUDA": "auto"}, run.work / "ninja", LIBRARY)
            steps.append({"step": "ninja file", "code": 0, "output": " ".join(command)})
        steps.append({"step": "this GPU", "output": str(this_gpu(run))})
        # Here, because a worker that compiles for minutes would be taken for one that hangs.
        emulate = "import bench.gpu_suite, emulator; emulator.load()"
        code, output = run.command([sys.executable, "-c", emulate], seconds=240)
        steps.append({"step": "emulator", "code": code, "output": output[-2000:]})
    stage = {"status": "passed" if found else "failed", "summary": {"library": how if found else None}, "steps": steps}
    if found is None:
        stage["reason"] = reason + "".join(f"\n{step['step']}: {step['output'][-1500:]}" for step in steps)
        if run.dry:
            stage["status"] = "skipped"  # the references serve
    else:
        stage["facts"] = {**found, "resources": resources(ROOT / "build") if how == "built here" else {}}
    return stage
