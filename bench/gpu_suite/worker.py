"""Runs the items of one stage in this process: `python -m bench.gpu_suite.worker STAGE RECORD [--quick]`.

The device is the GPU, or with TOKENPRUNE_TEST_GPU=emulated its CPU twin.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from . import behaviour, device, floors, samples, timing, triton_rows, work

STAGES = ("contact", "samples", "floors", "behaviour", "timing", "triton", "triton_warm", "compiled")


def items_of(stage: str, quick: bool) -> tuple[dict[str, Callable[[], work.Item]], device.Device]:
    where, toy = device.pick(), device.dry()
    if stage == "contact":
        return samples.first_contact(where), where
    if stage == "samples":
        return samples.all_samples(where), where
    if stage == "floors":
        return floors.items(where), where
    if stage == "behaviour":
        return behaviour.items(where, toy, quick), where
    if stage == "timing":
        return timing.items(where, toy, quick), where
    if stage == "triton":
        return triton_rows.items(where, toy, quick), where
    if stage == "triton_warm":
        return triton_rows.warm_items(where, toy, quick), where
    return timing.compiled_items(where, toy, quick), where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("record", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    # Plain float32 products: a reference in TF32 would be neither a reference nor a fair opponent.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    items, where = items_of(arguments.stage, arguments.quick)
    work.run_items(items, arguments.record, where.broken)


if __name__ == "__main__":
    main()
