"""Made-up visual tokens that look like those of real images: neighbours are alike."""

import torch
from torch import Tensor

from .shapes import MODELS, Model


def make_features(kind: str, model: Model, width: int) -> Tensor:
    """[1, N, width]: `gaussian`, where no two tokens are alike, or `image`, a smooth field plus noise."""
    if kind == "gaussian":
        return torch.randn(1, model.tokens, width)
    rows, columns = model.grid
    coarse = torch.randn(model.crops, 24, max(rows // 3, 1), max(columns // 3, 1))
    smooth = torch.nn.functional.interpolate(coarse, size=model.grid, mode="bicubic", align_corners=True)
    field = smooth.flatten(2).mT.reshape(-1, 24) @ torch.randn(24, width) / 24**0.5
    return (field + 0.5 * torch.randn(width) + 0.3 * torch.randn(field.shape)).unsqueeze(0)


def grid_positions(model: Model) -> Tensor:
    """Where each token lies in its crop, in [0, 1]."""
    rows, columns = (torch.linspace(0, 1, size) for size in model.grid)
    return torch.cartesian_prod(rows, columns).repeat(model.crops, 1).unsqueeze(0)


def image(model: str | Model, dtype: torch.dtype, patch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, features, positions and groups of one image. Tokens come in patches of similar features, as in an image
    (patch 1: all tokens differ); scores are the softmax of Gaussian logits, as attention is."""
    torch.manual_seed(seed)
    shape = MODELS[model] if isinstance(model, str) else model
    height, width = shape.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows, columns], -1).reshape(1, -1, 2).float().repeat(1, shape.crops, 1)
    groups = torch.arange(shape.crops).repeat_interleave(height * width).unsqueeze(0)
    small = torch.randn(shape.crops, -(-height // patch), -(-width // patch), shape.hidden)
    features = small.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
    features = features.reshape(1, -1, shape.hidden) + 0.2 * torch.randn(1, shape.tokens, shape.hidden)
    scores = torch.softmax(2 * torch.randn(1, shape.tokens), -1)
    return scores, features.to(dtype), positions, groups
