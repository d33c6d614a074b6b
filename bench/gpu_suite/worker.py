"""Runs the items of one stage in this process: `python -m bench.gpu_suite.worker STAGE RECORD [--quick] [--rows NAME]`.

The device is the GPU, or with TOKENPRUNE_TEST_GPU=emulated its CPU twin.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench.rows import Row, Scale, gpu_rows, matching
from testing import gpu_samples, op_samples
from testing.gpu_device import Device, dry, pick
from testing.op_samples import Sizes

from . import floors, timing, triton_rows, tune, work

Items = dict[str, Callable[[], work.Item]]
ROW_STAGES: dict[str, Callable[[Device, list[Row], bool, bool], Items]] = {
    "timing": timing.items,
    "behaviour": timing.behaviour_items,
    "tune": tune.items,
    "peers": timing.peer_items,
    "triton": triton_rows.items,
    "triton_warm": triton_rows.warm_items,
    "compiled": timing.compiled_items,
}


def items_of(stage: str, device: Device, pattern: str, quick: bool) -> Items:
    if stage == "contact":
        return {"device limits": lambda: {"limits": device.limits()}, **gpu_samples.first_contact(device)}
    if stage == "samples":
        return gpu_samples.all_samples(device)
    if stage == "floors":
        return floors.items(device)
    return ROW_STAGES[stage](device, matching(gpu_rows(Scale(dry())), pattern), dry(), quick)


def once(device: Device, pattern: str) -> None:
    """A few plain calls of the first row of that name, for a profiler to look at."""
    row = matching(gpu_rows(Scale(dry())), pattern)[0]
    ours, inputs = device.serve(row.ours, *row.ops), row.make(device.torch_device, 0)
    with torch.inference_mode():
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
    parser.add_argument("stage", choices=("contact", "samples", "floors", *PROGRAMS, *ROW_STAGES))
    parser.add_argument("record", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", default="")
    arguments = parser.parse_args()
    # Plain float32 products: a reference in TF32 would be neither a reference nor a fair opponent.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    device = pick()
    if arguments.stage in PROGRAMS:
        return PROGRAMS[arguments.stage](device, arguments.rows)
    items = items_of(arguments.stage, device, arguments.rows, arguments.quick)
    return work.run_items(items, arguments.record, device.broken)


if __name__ == "__main__":
    main()
