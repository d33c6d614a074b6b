"""Running models whose images differ in size inside a block, and how salient their tokens are, computed by hand."""

import functools
import inspect
import itertools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

from . import oracle
from .checks import options_of, spy_on
from .models import Prompts
from .models_crops import (
    RAGGED,
    SEVERAL,
    SINGLE,
    internvl,
    internvl_video,
    llava_next,
    llava_onevision,
    llava_onevision_video,
)
from .models_towers import pixtral

FAMILIES: dict[str, Callable[..., Prompts]] = {
    "llava_next": llava_next, "llava_onevision": llava_onevision, "internvl": internvl, "pixtral": pixtral,
}  # fmt: skip
VIDEOS: dict[str, Callable[..., Prompts]] = {"llava_onevision": llava_onevision_video, "internvl": internvl_video}
BATCHES = {"single": SINGLE, "ragged": RAGGED, "several": SEVERAL, "beside text alone": [[], [(20, 44)]]}


@functools.cache
def prompts_of(family: str, batch: str) -> Prompts:
    """Shared by all tests: leaving a block restores the model."""
    return VIDEOS[family]() if batch == "video" else FAMILIES[family](BATCHES[batch])


def pruned(prompts: Prompts, method: str, keep: int | float, **more: Any) -> Any:
    return prune_visual_tokens(prompts.model, method, keep, seed=5, **options_of(method), **more)


def banned(prompts: Prompts) -> list[int]:
    """What is never decoded: ids that stand for no text, and the end of the text."""
    end = torch.tensor(prompts.model.generation_config.eos_token_id or []).flatten().long()
    return [*torch.tensor(prompts.visual).flatten().tolist(), *prompts.special, *end.tolist()]


def beams_are_repeated_after_encoding(prompts: Prompts) -> bool:
    return "mm_encoder_outputs" in inspect.signature(prompts.model.forward).parameters


def generate(prompts: Prompts, steps: int, **more: Any) -> tuple[Tensor, Tensor]:
    """The new tokens [B, steps] of greedy decoding, and the logits of every step [B, steps, vocabulary]."""
    with torch.no_grad():
        out = prompts.model.generate(
            **prompts.inputs, max_new_tokens=steps, do_sample=False, suppress_tokens=banned(prompts),
            return_dict_in_generate=True, output_logits=True, **more,
        )  # fmt: skip
    return out.sequences[:, prompts.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def layout_in(pruning: Any) -> Any:
    return pruning._block.report.layout()


def saliency_given(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[B, V] float64: what adafv gets."""
    given = []

    def spy(**arguments: Any) -> methods.Selection:
        given.append(arguments["saliency"])
        return methods.adafv(**arguments)

    spy_on(monkeypatch, "adafv", "adafv", spy)
    with pruned(prompts, "adafv", 7):  # one number for all samples: one call
        generate(prompts, 1)
    (saliency,) = given
    found: Tensor = saliency.double()
    return found


def assert_saliency(prompts: Prompts, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the samples, which is not the same for all tokens, and 0 in the padding."""
    for row, exact in zip(saliency_given(prompts, monkeypatch), expected, strict=True):
        torch.testing.assert_close(row[: len(exact)], exact, rtol=1e-4, atol=1e-7)
        assert (row[len(exact) :] == 0).all()
        assert exact.max() > 1.05 * exact[exact > 0].min()


def vision_weights(prompts: Prompts, attention: str, layer: int, tower: str = "vision_tower") -> list[Tensor]:
    """[crops, heads, queries, keys] in float64, of each run of a tower of the core, from its eager attention."""
    exact = oracle.in_float64(prompts)
    exact.model.set_attn_implementation("eager")
    found = attrgetter(tower)(exact.model.model)
    body = getattr(found, "vision_model", found)
    encoder = body.transformer if hasattr(body, "transformer") else body.encoder
    seen: list[Tensor] = []
    module = getattr(list(getattr(encoder, "layers", None) or encoder.layer)[layer], attention)
    module.register_forward_hook(lambda m, a, output: seen.append(output[1]))
    if "output_attentions" in inspect.signature(module.forward).parameters:  # Pixtral until transformers 5.11 or so
        asked = {"output_attentions": True}
        module.register_forward_pre_hook(lambda m, args, given: (args, {**given, **asked}), with_kwargs=True)
    with torch.no_grad():
        exact.model(**exact.inputs)
    return seen


def llava_next_saliency(prompts: Prompts) -> list[Tensor]:
    """By hand for the images of RAGGED: 4 x 12 patches of which columns 2..9 are left, and 8 x 8, columns 2..5."""
    (weights,) = vision_weights(prompts, "self_attn", -2)
    crops = weights[:, :, 0, 1:].mean(1).view(-1, 4, 4)
    assert len(crops) == 4 + 5
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:10]
    tall = torch.cat([torch.cat([crops[5], crops[6]], 1), torch.cat([crops[7], crops[8]], 1)], 0)[:, 2:6]
    return [
        torch.cat([base.flatten(), torch.nn.functional.pad(rest, (0, 1)).flatten()])
        for base, rest in ((crops[0], wide), (crops[4], tall))
    ]


def shrunk(grid: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing: two rows and two columns around each sample point."""
    result = grid.new_zeros(height, width)
    for i, j in itertools.product(range(height), range(width)):
        y, x = (i + 0.5) * grid.shape[0] / height - 0.5, (j + 0.5) * grid.shape[1] / width - 0.5
        for r, c in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
            result[i, j] += grid[r, c] * max(0, 1 - abs(r - y)) * max(0, 1 - abs(c - x))
    return result


def llava_onevision_saliency(prompts: Prompts) -> list[Tensor]:
    """By hand for RAGGED: 5 x 15 patches of which columns 2..12 are left, and 15 x 10 shrunk to 8 x 5."""
    (weights,) = vision_weights(prompts, "self_attn", -1)
    crops = weights.mean((1, 2)).view(-1, 5, 5)
    assert len(crops) == 4 + 7
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:13]
    tall = torch.cat([torch.cat([crops[5 + 2 * r], crops[6 + 2 * r]], 1) for r in range(3)], 0)
    return [
        torch.cat([base.flatten(), torch.nn.functional.pad(rest, (0, 1)).flatten()])
        for base, rest in ((crops[0], wide), (crops[4], shrunk(tall, 8, 5)))
    ]


def blocks(grid: Tensor) -> Tensor:
    """The mean over each 2 x 2 block, one block after the other."""
    rows, columns = grid.shape
    return torch.stack([grid[r : r + 2, c : c + 2].mean() for r in range(0, rows, 2) for c in range(0, columns, 2)])


def internvl_saliency(prompts: Prompts) -> list[Tensor]:
    """RAGGED is 1 x 3 tiles and 3 x 2, each with a thumbnail."""
    (weights,) = vision_weights(prompts, "attention", -1)
    tiles = [blocks(tile) for tile in weights[:, :, 0, 1:].mean(1).view(-1, 8, 8)]
    assert len(tiles) == 4 + 7
    return [torch.cat(tiles[:4]), torch.cat(tiles[4:])]


def onevision_video_saliency(prompts: Prompts) -> list[Tensor]:
    """A video, and an image with a video: frames of 5 x 5 are pooled to 3 x 3, and a newline ends the video."""
    images, frames = (w.mean((1, 2)).view(-1, 5, 5) for w in vision_weights(prompts, "self_attn", -1))
    zero = frames.new_zeros(1)
    videos = [torch.cat([*(shrunk(f, 3, 3).flatten() for f in each), zero]) for each in frames.view(2, 3, 5, 5)]
    wide = torch.cat([images[1], images[2], images[3]], 1)[:, 2:13]
    image = torch.cat([images[0].flatten(), torch.nn.functional.pad(wide, (0, 1)).flatten()])
    return [videos[0], torch.cat([image, videos[1]])]


def pixtral_saliency(prompts: Prompts) -> list[Tensor]:
    """RAGGED is 5 x 11 patches and 12 x 7, one sequence in which each sees itself."""
    (weights,) = vision_weights(prompts, "attention", -1)
    assert weights.shape[2:] == (55 + 84, 55 + 84)
    return [weights[0, :, :55, :55].mean((0, 1)), weights[0, :, 55:, 55:].mean((0, 1))]


SALIENCY = {
    "llava_next": llava_next_saliency, "llava_onevision": llava_onevision_saliency, "internvl": internvl_saliency,
    "pixtral": pixtral_saliency,
}  # fmt: skip
