"""The package as the kernel hub loads it: `make hub` first, and `pip install kernels`.

A copy of the hub has a name of its own, so that it meets no installed one; one copy in a process is the rule.
"""

import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

tp = get_local_kernel(Path(sys.argv[1] if len(sys.argv) > 1 else "build/hub"))
indices, counts = tp.select_topk(torch.tensor([[0.1, 0.7, 0.4]]), 2)
print(f"{tp.__version__} from the hub's form keeps {indices.tolist()}; backends {tp.config()['backends']}")
