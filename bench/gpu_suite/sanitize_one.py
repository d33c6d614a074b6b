"""The program that compute-sanitizer watches: every sample of one op, on small inputs and on some of several blocks.

`python -m bench.gpu_suite.sanitize_one OP`. Inputs are made on the CPU and copied, so that the op's own kernels are
nearly all that runs on the device; a line before each sample says which one a report belongs to.
"""

import sys

import torch

from testing import op_samples
from testing.gpu_device import pick
from testing.gpu_samples import run_sample
from testing.op_samples import Sizes

SMALL = Sizes(tokens=37, channels=40, k=9)
LARGER = Sizes(tokens=300, rows=17, channels=72, k=40, listed=30)  # more than one warp, one tile, one block
CASES = ((SMALL, torch.float32), (LARGER, torch.float16))


def main() -> None:
    (op,) = sys.argv[1:]
    where = pick()
    for sizes, dtype in CASES:
        for name in op_samples.FACTORIES[op]:
            print(f"SAMPLE {op}-{name}-{str(dtype).removeprefix('torch.')}-N{sizes.tokens}", flush=True)
            run_sample(where, op, name, dtype, sizes)
    where.synchronize()
    print("ALL SAMPLES DONE", flush=True)


if __name__ == "__main__":
    main()
