"""What a vision encoder would supply, computed from the picture: descriptors of its patches, in four heads.

No trained model is involved. Each head describes one aspect of a patch in 16 numbers, standardised over the picture,
so that query and key have the shape [B, H, M, D] of a real attention layer.
"""

import itertools
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage.color import rgb2lab
from skimage.filters import gaussian
from torch import Tensor

import tokenprune_kernels as tp

GRID = 24
PATCH = 14
SIDE = GRID * PATCH
TOKENS = GRID * GRID
WIDTH = 16  # D, numbers per head
TEMPERATURE = 8.0  # attention logits are TEMPERATURE * cosine
QUESTION_RADIUS = 2.0  # in patches

Array: TypeAlias = npt.NDArray[np.float64]


class Inputs(NamedTuple):
    """The arguments the methods are called with; B = 1."""

    query: Tensor  # [1, H, M, D]: the question, the patches around the focus; the focus itself is the last row
    key: Tensor  # [1, H, N, D]
    features: Tensor  # [1, N, C], C = H * D
    text: Tensor  # [1, M, C]
    saliency: Tensor  # [1, N]: the attention a patch receives from all patches
    positions: Tensor  # [1, N, 2]: row and column


def _patches(plane: Array) -> Array:
    """[336, 336, channels] -> [576, 196, channels]."""
    patches: Array = plane.reshape(GRID, PATCH, GRID, PATCH, -1).swapaxes(1, 2).reshape(TOKENS, PATCH * PATCH, -1)
    return patches


def _colour(lab: Array) -> Array:
    """Mean, spread and quartiles of the Lab colours, how they differ from the patches around, and the chroma."""
    patches = _patches(lab)
    mean = patches.mean(1)
    padded = np.pad(mean.reshape(GRID, GRID, 3), ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = np.mean([padded[r : r + GRID, c : c + GRID] for r in range(3) for c in range(3)], axis=0)
    low, high = np.percentile(patches, (25, 75), axis=1)
    chroma = np.hypot(mean[:, 1], mean[:, 2])[:, None]
    return np.concatenate((mean, patches.std(1), low, high, mean - around.reshape(TOKENS, 3), chroma), axis=1)


def _layout(lab: Array) -> Array:
    """Where in the patch the colours are: mean Lab and spread of the lightness of its four quarters."""
    half = PATCH // 2
    quarters = lab.reshape(GRID, 2, half, GRID, 2, half, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    quarters = quarters.reshape(TOKENS, 4, half * half, 3)
    return np.concatenate((quarters.mean(2).reshape(TOKENS, 12), quarters[..., 0].std(2)), axis=1)


def _orientation(lab: Array) -> Array:
    """Histogram of the directions of the lightness gradient over 180 degrees, each pixel shared by two bins."""
    down, right = np.gradient(lab[..., 0])
    strength = _patches(np.hypot(down, right))[..., 0]
    at = _patches(np.arctan2(down, right) % np.pi * (WIDTH / np.pi))[..., 0]
    lower = np.floor(at)
    share = at - lower
    token = np.arange(TOKENS)[:, None]
    histogram = np.zeros((TOKENS, WIDTH))
    np.add.at(histogram, (token, lower.astype(np.int64) % WIDTH), strength * (1 - share))
    np.add.at(histogram, (token, (lower.astype(np.int64) + 1) % WIDTH), strength * share)
    compressed: Array = np.sqrt(histogram / strength.shape[1])
    return compressed


def _contrast(lab: Array) -> Array:
    """Energy of four band-passes of each Lab channel; size, spread and coherence of the gradient."""
    blurred = [lab] + [gaussian(lab, sigma, channel_axis=-1) for sigma in (0.7, 1.4, 2.8, 5.6)]
    bands = [_patches(fine - coarse).std(1) for fine, coarse in itertools.pairwise(blurred)]
    down, right = np.gradient(lab[..., 0])
    strength = _patches(np.hypot(down, right))[..., 0]
    moments = _patches(np.stack((down * down - right * right, 2 * down * right, down * down + right * right), -1)).mean(
        1
    )
    coherence = np.hypot(moments[:, 0], moments[:, 1]) / (moments[:, 2] + 1e-6)
    size = (strength.mean(1), strength.std(1), np.percentile(strength, 90, axis=1), coherence)
    return np.concatenate((*bands, np.stack(size, axis=1)), axis=1)


def descriptors(image: Image.Image) -> Tensor:
    """[H, N, D] float32: every head's descriptor of every patch, of length 1 (0 where the picture is uniform)."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGB"))
    lab: Array = rgb2lab(pixels).astype(np.float64)
    heads = []
    for describe in (_colour, _layout, _orientation, _contrast):
        raw = describe(lab)
        spread = raw.std(0)
        # What varies by rounding alone says nothing.
        scale = np.where(spread > 1e-6, spread, np.inf)
        standard = np.clip((raw - raw.mean(0)) / scale, -3, 3)
        length = np.linalg.norm(standard, axis=1, keepdims=True)
        heads.append(standard / np.maximum(length, 1e-12))
    return torch.from_numpy(np.stack(heads)).float()


def question_patches(focus: tuple[float, float]) -> Tensor:
    """The patches within QUESTION_RADIUS of the focus (fractions of the square), the nearest one last."""
    row, column = (min(int(at * GRID), GRID - 1) for at in (focus[1], focus[0]))
    token = torch.arange(TOKENS)
    distance = (token // GRID - row) ** 2 + (token % GRID - column) ** 2
    order = distance.argsort(descending=True, stable=True)
    return order[distance[order] <= QUESTION_RADIUS**2]


def inputs(image: Image.Image, focus: tuple[float, float], device: torch.device) -> Inputs:
    """Everything the methods need, from the square picture and the focus in fractions of it."""
    heads = descriptors(image).to(device)
    question = question_patches(focus).to(device)
    key = (heads * (TEMPERATURE * WIDTH**0.5) ** 0.5).unsqueeze(0)  # softmax logits use the scale D**-0.5
    features = heads.permute(1, 0, 2).reshape(1, TOKENS, -1)
    saliency, _, _ = tp.cross_attention_scores(key, key)
    token = torch.arange(TOKENS, device=device)
    positions = torch.stack((token // GRID, token % GRID), dim=-1).float().unsqueeze(0)
    return Inputs(key[:, :, question], key, features, features[:, question], saliency, positions)
