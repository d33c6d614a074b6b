"""Fails when the emulated tests left a line of a CUDA kernel, or an instantiation of one, without execution.

Reads the counts that the emulator's build writes (build/emulator/*.gcda, merged over processes) with gcov, for the
headers csrc/include/tokenprune/*.cuh. A line counts as executed when any instantiation of it ran; besides, every
instantiation of every function has to have run once. (The emulator is compiled with -O1: a branch that the compiler
turned into arithmetic has no line of its own.)

    python -m scripts.kernel_coverage --clear    # before the tests: forget earlier runs
    python -m scripts.kernel_coverage            # after them
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from testing import ROOT

KERNELS = ROOT / "csrc" / "include" / "tokenprune"
COUNTS = ROOT / "build" / "emulator"

# What no test can reach, by file name and a part of the source line or of the function's name; with the reason.
EXEMPT: dict[tuple[str, str], str] = {}


def gcov_files(counts: Path, folder: Path) -> list[dict]:
    """What gcov says about every source file of every object, from a copy of the counts that is its own."""
    for file in [*counts.glob("*.gcno"), *counts.glob("*.gcda")]:
        shutil.copy(file, folder)
    files = []
    for data in sorted(folder.glob("*.gcda")):
        command = [os.environ.get("GCOV") or "gcov", "--json-format", "--stdout", data.name]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if told.returncode:
            raise SystemExit(f"gcov failed on {data.name}:\n{told.stderr}")
        for line in told.stdout.splitlines():
            report = json.loads(line)
            compiled_in = Path(report["current_working_directory"])
            files += [{**file, "file": str(compiled_in / file["file"])} for file in report["files"]]
    return files


def is_exempt(file: str, text: str) -> bool:
    return any(file == name and part in text for name, part in EXEMPT)


def gaps(files: list[dict], kernels: Path, root: Path = ROOT) -> list[str]:
    """One message per line and per instantiation that never ran."""
    lines: dict[tuple[Path, int], int] = defaultdict(int)
    functions: dict[tuple[Path, int, str], int] = defaultdict(int)
    for file in files:
        path = Path(file["file"]).resolve()
        if path.suffix != ".cuh" or path.parent != kernels.resolve():
            continue
        for line in file["lines"]:
            lines[path, line["line_number"]] += line["count"]
        for function in file["functions"]:
            functions[path, function["start_line"], function["demangled_name"]] += function["execution_count"]
    if not lines:
        raise SystemExit(f"no line of {kernels}/*.cuh is in the counts: did the emulated tests run?")
    sources = {path: path.read_text().splitlines() for path, _ in lines}
    messages = []
    for (path, number), count in sorted(lines.items()):
        text = sources[path][number - 1].strip()
        if count == 0 and not is_exempt(path.name, text):
            messages.append(f"{path.relative_to(root)}:{number}: never executed: {text}")
    for (path, number, name), count in sorted(functions.items()):
        if count == 0 and not is_exempt(path.name, name):
            messages.append(f"{path.relative_to(root)}:{number}: this instantiation never ran: {name}")
    seen = {path.name for path in sources}
    for header in sorted(kernels.glob("*.cuh")):
        if header.name not in seen and has_code(header):
            messages.append(f"{header.relative_to(root)}: no test compiles and runs anything of it")
    return messages


def has_code(header: Path) -> bool:
    """ptx.cuh is replaced by the emulator's twins; a header of declarations has nothing to run."""
    return header.name != "ptx.cuh" and "{\n" in header.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clear", action="store_true", help="remove the counts of earlier runs")
    if parser.parse_args().clear:
        for file in COUNTS.glob("*.gcda"):
            file.unlink()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        messages = gaps(gcov_files(COUNTS, Path(folder)), KERNELS)
    print("\n".join(messages), file=sys.stderr)
    print(f"kernel coverage: {len(messages)} gaps" if messages else "kernel coverage: every line and instantiation ran")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
