"""Runs cases in 2 and in 4 processes that talk by gloo on this machine, all cases of a module in the same processes.

A module of cases has CASES, functions by name; a rank calls each of them, in one order, and an exception is that
case's result. usage: python -m tests.distributed.ranks MODULE FOLDER WORLD...
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from testing.process import python

Cases = dict[str, Callable[[], None]]
LIMIT = 120  # seconds that a rank waits for another one


def results(module: str, folder: Path, *worlds: int) -> dict[tuple[int, str], list[str]]:
    """What went wrong in each case of each number of processes, on any rank; nothing, where all is well."""
    done = python("-m", "tests.distributed.ranks", module, folder, *worlds, OMP_NUM_THREADS="1")
    said = f"no result; exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found: dict[tuple[int, str], list[str]] = {}
    for world in worlds:
        for rank in range(world):
            file = folder / f"{world}.{rank}"
            lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
            told = {line["case"]: line["error"] for line in lines}
            for case in importlib.import_module(module).CASES:
                errors = found.setdefault((world, case), [])
                if error := told.get(case, said):
                    errors.append(f"rank {rank} of {world}: {error}")
    return found


def _rank(rank: int, world: int, module: str, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}.store", rank=rank, world_size=world,
        timeout=timedelta(seconds=LIMIT),
    )  # fmt: skip
    os.environ["WORLD_SIZE"] = str(world)
    with (Path(folder) / f"{world}.{rank}").open("w") as file:
        for name, case in importlib.import_module(module).CASES.items():
            error = ""
            try:
                case()
            except Exception:
                error = traceback.format_exc()
            print(json.dumps({"case": name, "error": error}), file=file, flush=True)
    dist.destroy_process_group()


def main(module: str, folder: str, *worlds: str) -> None:
    importlib.import_module(module)  # once, before there are several
    for world in map(int, worlds):
        mp.start_processes(_rank, (world, module, folder), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
