"""A pruner exported with torch.export, and loaded in a process that has none of our Python code.

    python examples/export_pruner.py

The second process imports torch alone and loads the compiled library by its path.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels import _C

LOADER = """
import sys
import torch

library, program, inputs = sys.argv[1:]
torch.ops.load_library(library)
pruner = torch.export.load(program).module()
for tokens, query, key, hidden in torch.load(inputs):
    kept, indices = pruner(query, key, hidden)
    print(f"{tokens} tokens: kept {list(kept.shape)}, first indices {indices[0, :5].tolist()}")
assert "tokenprune_kernels" not in sys.modules
"""


class Pruner(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores, _, _ = tp.cross_attention_scores(query, key, query_reduction="max")
        indices, _ = tp.select_topk(scores, 64)
        return tp.gather_compact([hidden], indices, dims=[1])[0], indices


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, 8, 20, 64), (1, 2, tokens, 64), (1, tokens, 256))
    query, key, hidden = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, hidden


def main() -> None:
    tokens = torch.export.Dim("tokens", min=64, max=8192)
    program = torch.export.export(
        Pruner(), inputs(576), dynamic_shapes={"query": {}, "key": {2: tokens}, "hidden": {1: tokens}}
    )
    with tempfile.TemporaryDirectory() as folder:
        saved, asked = Path(folder) / "pruner.pt2", Path(folder) / "inputs.pt"
        torch.export.save(program, saved)
        torch.save([(n, *inputs(n)) for n in (576, 2880)], asked)
        done = subprocess.run(
            [sys.executable, "-c", LOADER, str(_C.__file__), str(saved), str(asked)],
            capture_output=True, text=True, check=True, cwd=folder,
        )  # fmt: skip
    print(done.stdout, end="")
    for n in (576, 2880):
        print(f"{n} tokens here: first indices {Pruner()(*inputs(n))[1][0, :5].tolist()}")


if __name__ == "__main__":
    main()
