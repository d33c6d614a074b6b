"""What the attention ops are compared with: the product alone, and the published scoring steps from their formulas."""

import torch
from torch import Tensor


def logits_alone(query: Tensor, expanded_key: Tensor) -> Tensor:
    """Only Q K^T, with the key heads expanded beforehand: the part that no implementation of the scores can avoid."""
    return query.float() @ expanded_key.mT


def fastv_last_row(query: Tensor, key: Tensor) -> Tensor:
    """FastV and AdaptPrune: softmax of the last prompt token's row, mean over heads; [B, N]."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, dim=1).mT / query.shape[-1] ** 0.5
    return logits.softmax(-1, dtype=torch.float32).mean(1)[:, -1]


def adafv_text_to_image(text: Tensor, image: Tensor, temperature: float = 100.0) -> Tensor:
    """AdaFV: softmax over image tokens of temperature * cosine, maximum over text rows: [B, N]."""
    text = torch.nn.functional.normalize(text.float(), dim=-1)
    image = torch.nn.functional.normalize(image.float(), dim=-1)
    return (temperature * text @ image.mT).softmax(-1).amax(1)


def coast_rows(query: Tensor, key: Tensor) -> Tensor:
    """COAST: mean over heads of the softmax, then its maximum over text rows and its last row; [B, 2, N]."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, dim=1).mT / query.shape[-1] ** 0.5
    mean = logits.softmax(-1, dtype=torch.float32).mean(1)
    return torch.stack((mean.amax(1), mean[:, -1]), dim=1)
