"""Mixtures of experts beside a float64 path: a token near a tie between experts may go to others there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# float32 errs by some 1e-6 in a router's logits, which are about 1.
CLEAR = 2e-5


@contextmanager
def clear_routing() -> Iterator[None]:
    """Every router that runs inside has so much between the last expert that it takes and the next one."""
    gaps: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if "Router" in type(module).__name__ and isinstance(output, tuple):
            best = output[0].float().topk(module.top_k + 1, dim=-1).values
            seen = best[..., 0] != best[..., -1]  # padding has an embedding of 0, and no logits
            gaps.append((best[..., -2] - best[..., -1])[seen].min())

    handle: Any = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
    assert not gaps or min(gaps) > CLEAR, f"experts are within {min(gaps):.1e} of a tie: choose another seed"
