"""A module of another project that calls the ops by name: no import of ours in the module's own code.

    python examples/third_party_module.py

Importing tokenprune_kernels once, anywhere in the process, is what makes torch.ops.tokenprune exist.
"""

import torch
from torch import Tensor, nn

import tokenprune_kernels  # noqa: F401  (registers the ops)


class PrunedVisualPrompt(nn.Module):
    """Keeps the visual tokens that the question attends to most, with their positions, in one gather."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, query: Tensor, key: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, _, _ = torch.ops.tokenprune.cross_attention_scores(query, key, query_reduction="mean")
        indices, counts = torch.ops.tokenprune.select_topk(scores[:, 0], self.keep)
        hidden, positions = torch.ops.tokenprune.gather_compact([hidden, positions], indices, dims=[1, 1])
        return hidden, positions, counts


def main() -> None:
    torch.manual_seed(0)
    module = PrunedVisualPrompt(keep=128)
    query, key = torch.randn(1, 32, 20, 128), torch.randn(1, 32, 576, 128)
    hidden, positions = torch.randn(1, 576, 1024), torch.arange(576).view(1, 576)
    kept, indices, counts = module(query, key, hidden, positions)
    print(f"kept {list(kept.shape)}, count {counts.tolist()}, indices {indices[0, :6].tolist()} ...")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    same = all(
        torch.equal(a, b) for a, b in zip(compiled(query, key, hidden, positions), (kept, indices, counts), strict=True)
    )
    print(f"compiled with fullgraph=True: {'equal' if same else 'different'}")


if __name__ == "__main__":
    main()
