"""Runs the items of one stage in this process: `python -m bench.gpu_suite.worker STAGE RECORD [--rows NAME]`.

The device is the GPU, or with TOKENPRUNE_TEST_GPU=emulated its CPU twin.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.rows import Row, Scale, gpu_rows, matching
from testing import gpu_samples, op_samples
from testing.gpu_device import Device, pick
from testing.op_samples import Sizes

from . import floors, timing, tune
from .work import Item, Items, run_items

STAGES: dict[str, Callable[[Device], Items]] = {
    "contact": lambda device: {"device limits": lambda: {"limits": device.limits()},
                               **gpu_samples.first_contact(device)},
    "samples": gpu_samples.all_samples,
    "floors": floors.items,
}  # fmt: skip
ROW_STAGES: dict[str, Callable[[Device, Row], Item]] = {
    "timing": lambda device, row: timing.time_in_turn(device, row, row.others),
    "behaviour": timing.behaviour,
    "triton": timing.compare,
    "triton_warm": timing.first_call,
}
TABLE_STAGES: dict[str, Callable[[Device, list[Row]], Items]] = {
    "tune": tune.items,
    "peers": timing.peer_items,
    "compiled": timing.compiled_items,
}
INTERPRETED = ("attention_entropy",), ("select_topk",), ("score_entropy",)


def chosen(stage: str, device: Device, pattern: str) -> list[Row]:
    """The rows of that name. Some stages of a dry run take one row of an op, and Triton's few ops: interpreted kernels
    take seconds, and products of bfloat16 matrices are wrong there (testing/cases.py)."""
    rows = matching(gpu_rows(Scale(not device.real)), pattern)
    if device.real or stage in ("timing", "behaviour", "peers"):
        return rows
    if stage.startswith("triton"):
        rows = [row for row in rows if row.dtype != torch.bfloat16 and row.ops in INTERPRETED]
    return [*{row.ops: row for row in rows}.values()]


def items_of(stage: str, device: Device, pattern: str) -> Items:
    if stage in STAGES:
        return STAGES[stage](device)
    rows = chosen(stage, device, pattern)
    if stage in TABLE_STAGES:
        return TABLE_STAGES[stage](device, rows)
    return {row.name: partial(ROW_STAGES[stage], device, row) for row in rows}


@torch.inference_mode()
def once(device: Device, pattern: str) -> None:
    """A few plain calls of the first row of that name, for a profiler to look at."""
    row = chosen("timing", device, pattern)[0]
    ours, inputs = device.serve(row.ours, *row.ops), row.make(device.torch_device, 0)
    for _ in range(3):
        ours(inputs)
    device.synchronize()


# The second has more than one warp, tile and block. Inputs are made on the CPU, so that little else runs on the device.
SANITIZED = (
    (Sizes(tokens=37, channels=40, k=9), torch.float32),
    (Sizes(tokens=300, rows=17, channels=72, k=40, listed=30), torch.float16),
)


def sanitize(device: Device, op: str) -> None:
    """The program that compute-sanitizer watches: a line before each sample says which one a report belongs to."""
    for sizes, dtype in SANITIZED:
        for name in op_samples.FACTORIES[op]:
            print(f"SAMPLE {op}-{name}-{str(dtype).removeprefix('torch.')}-N{sizes.tokens}", flush=True)
            gpu_samples.run_sample(device, op, name, dtype, sizes)
    device.synchronize()
    print("ALL SAMPLES DONE", flush=True)


# What other tools watch; `--rows` names a row, or an op.
PROGRAMS: dict[str, Callable[[Device, str], None]] = {"once": once, "sanitize": sanitize}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, *ROW_STAGES, *TABLE_STAGES, *PROGRAMS))
    parser.add_argument("record", type=Path)
    parser.add_argument("--rows", default="")
    arguments = parser.parse_args()
    stage, pattern = arguments.stage, arguments.rows
    # Plain float32 products: a reference in TF32 would be neither a reference nor a fair opponent.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    device = pick()
    if stage in PROGRAMS:
        return PROGRAMS[stage](device, pattern)
    return run_items(items_of(stage, device, pattern), arguments.record, device.broken)


if __name__ == "__main__":
    main()
