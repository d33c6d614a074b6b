"""Muon for the matrices of the layers, AdamW for everything else.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without such instructions emulates a hundred times slower than
float32; this one does it in float32, all matrices of a shape in one batched product. The update is the same:
momentum, five Newton-Schulz steps, and a step length that matches AdamW's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values to about one


def orthogonalised(matrices: Tensor) -> Tensor:
    """[M, r, c]: each matrix with its singular values near one."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, orthogonalised; weight decay is decoupled."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    moving = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    moving.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(moving, group["momentum"]))
                length = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * length)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """One of each kind; both take `lr` as AdamW understands it."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else rest).append(parameter)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
