"""The compiled library: a prebuilt one that runs on this GPU, else built here with this machine's own compilers.

Nothing is installed and nothing is fetched: the ninja file that setup.py writes is run directly, since what setup.py
itself needs of packaging is not on every machine.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from testing import ROOT
from testing.setup_file import setup_module

from .environment import find_program
from .work import Run, Stage

LIBRARY = ROOT / "tokenprune_kernels" / "_C.abi3.so"
# Loads the library and runs a kernel: a build for another architecture loads, and fails only at the launch.
PROBE = """
import bench.gpu_suite, json, torch, tokenprune_kernels as tp
from tokenprune_kernels import _registry
info = _registry.build_info()
assert info, f"not loaded: {_registry.load_error()}"
if torch.cuda.is_available():
    assert info.get("cuda_architectures"), "it has no CUDA kernels"
    x = torch.rand(3, 100)
    got = tp.score_entropy(x.cuda(), backend="cuda").cpu()
    torch.testing.assert_close(got, tp.reference.score_entropy(x))
print("FOUND", json.dumps(info))
"""


def probe(run: Run) -> tuple[Any, str]:
    """(what the library says of itself, "") when it serves here, else (None, why not)."""
    found, output = run.python(PROBE, seconds=90)
    return found, "" if found else f"the library does not serve here: {output[-1500:]}"


def ninja_command(folder: Path) -> list[str]:
    """Writes the ninja file that setup.py would write, and returns the command that runs it. The architecture is that
    of the GPU here, unless TORCH_CUDA_ARCH_LIST names others; whatever is missing is a SystemExit that says so."""
    nvcc = find_program("nvcc")
    home = {"CUDA_HOME": str(Path(nvcc).parent.parent)} if nvcc and "CUDA_HOME" not in os.environ else {}
    folder.mkdir(parents=True, exist_ok=True)
    with patch.dict(os.environ, {"TOKENPRUNE_CUDA": "1", **home}):
        setup = setup_module()
        compiler = setup.find_compiler()
        if compiler is None:
            raise SystemExit("no C++ compiler (g++) on this machine")
        sources = sorted((setup.CSRC / "cuda").glob("*.cu"))
        command: list[str] = setup.prepared(folder, LIBRARY, compiler, setup.cuda_compiler(sources), sources)
    return command


def compile_here(run: Run) -> dict[str, Any]:
    """One step of the stage; a dry run writes the ninja file and stops there."""
    folder = run.work / "ninja" if run.dry else ROOT / "build" / f"gpu_suite.{platform.machine()}"
    try:
        command = ninja_command(folder)
    except (SystemExit, subprocess.SubprocessError) as error:
        return {"step": "ninja file", "code": None, "output": str(error)}
    code, output = (0, shlex.join(command)) if run.dry else run.command(command, seconds=600)
    return {"step": "ninja", "code": code, "output": output[-4000:]}


def run(run: Run) -> Stage:
    steps: list[dict[str, Any]] = []
    found, reason = probe(run)
    how = "prebuilt"
    if run.dry or found is None:
        run.say(f"build: {reason or 'a dry run'}; compiling")
        steps.append(compile_here(run))
    if run.dry:  # here, because a worker that compiles for minutes would be taken for one that hangs
        emulate = "import bench.gpu_suite, emulator; emulator.load()"
        code, output = run.command([sys.executable, "-c", emulate], seconds=240)
        steps.append({"step": "emulator", "code": code, "output": output[-2000:]})
    elif found is None:
        how = "built here"
        found, reason = probe(run)
    if found is not None:
        return {"status": "passed", "summary": {"library": how}, "facts": found, "steps": steps}
    told = "".join(f"\n{step['step']}: {step['output'][-1500:]}" for step in steps)
    # In a dry run the references serve.
    return {"status": "skipped" if run.dry else "failed", "reason": reason + told, "summary": {}, "steps": steps}
