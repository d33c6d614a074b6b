"""`python -m testing.triton_compile`: compile every specialisation of every kernel, and say what each costs."""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from testing import ROOT

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))  # a second run finds what the first compiled

import triton

import tokenprune_kernels.triton as kernels

from . import bad, measure, record
from .results import TARGETS, Result, complaints
from .shapes import SHAPES

_wanted: list[record.Specialisation] = []  # the workers are forks and know it


def _compile(i: int) -> Result:
    return measure.compile_one(_wanted[i])


def without_code(w: record.Specialisation) -> Result:
    return Result(w.name, w.target, w.label, w.described(), compiled=False)


def compile_all(wanted: list[record.Specialisation], jobs: int) -> Iterator[Result]:
    """The results in the order in which they are ready."""
    global _wanted
    _wanted = wanted
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        specialisation = {pool.submit(_compile, i): wanted[i] for i in range(len(wanted))}
        for done in as_completed(specialisation):
            w = specialisation[done]
            try:
                yield done.result()
            except BrokenProcessPool:
                died = "a process of the compiler died, here or at another kernel"
                yield without_code(w)._replace(error=died)


def progress(results: Iterator[Result], total: int) -> list[Result]:
    began = told = time.monotonic()
    seen = []
    for result in results:
        seen.append(result)
        if time.monotonic() - told > 10 or len(seen) == total:
            told = time.monotonic()
            print(f"triton: {len(seen)} of {total} compiled, {told - began:.0f} s", flush=True)
    return seen


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tests and the table are made of."""
    shapes = {op: calls for op, calls in SHAPES.items() if hasattr(kernels, op) and re.search(arguments.ops, op)}
    wanted: list[record.Specialisation] = []
    choosing = record.config_functions()
    with record.executed(choosing.values()) as seen:
        for target in arguments.targets:
            found = bad.record(target) if arguments.bad else record.record(target, shapes)
            if arguments.sample:
                found = list({(w.name, w.element): w for w in reversed(found)}.values())
            print(f"triton {triton.__version__}: {len(found)} specialisations for {target}", flush=True)
            wanted += found
    order = {(w.name, w.target, w.described(), w.label): i for i, w in enumerate(wanted)}
    due = record.half(wanted) if arguments.half else wanted
    results = progress(compile_all(due, arguments.jobs), len(due))
    done = {id(w) for w in due}
    results += [without_code(w) for w in wanted if id(w) not in done]
    results.sort(key=lambda r: order[r.kernel, r.target, r.described, r.label])
    unreached = {name: sorted(record.lines_of(f.__code__) - seen[f.__code__]) for name, f in choosing.items()}
    return {
        "triton": triton.__version__,
        "results": [r._asdict() for r in results],
        "functions": sorted(record.jit_functions()),
        "unused helpers": record.unused_helpers(),
        "ops": sorted(shapes),
        "without kernels": sorted(SHAPES.keys() - shapes.keys()),
        "unreached lines": {name: lines for name, lines in unreached.items() if lines},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m testing.triton_compile", description=__doc__)
    parser.add_argument("--targets", type=lambda s: s.split(","), default=list(TARGETS), help="sm_80,gfx942,...")
    parser.add_argument("--ops", default="", help="only the ops that match this regular expression")
    parser.add_argument("--sample", action="store_true", help="one specialisation per kernel, element type and target")
    parser.add_argument("--half", action="store_true", help="every other specialisation; the rest is only recorded")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--output", type=Path, help="write everything to this file, as JSON")
    parser.add_argument("--bad", action="store_true", help="instead, kernels that have to be complained about")
    parser.add_argument("--every", action="store_true", help="print a line per specialisation")
    arguments = parser.parse_args()
    told = report(arguments)
    results = [Result(**r) for r in told["results"]]
    if arguments.output:
        arguments.output.write_text(json.dumps(told))
    if arguments.every:
        for r in results:
            print(
                f"{r.target:>7} {r.registers:>4} registers {r.shared:>7} shared {r.local:>4} local"
                f" {r.matrix or '-':>16} {r.seconds:>6.1f} s  {r.label}  {r.described}"
            )
    wrong = complaints(results)
    print("\n".join(wrong), end="\n" if wrong else "")
    compiled = sum(r.compiled for r in results)
    spent = sum(r.seconds for r in results)
    print(f"triton: {compiled} of {len(results)} specialisations compiled, {spent:.0f} s of CPU time")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
