"""What the integration has to know of a model family: one small `Family` each, found by the config's model_type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Model = Any  # a module whose attributes depend on the family
Inputs = dict[str, Any]  # the keyword arguments of the multimodal model's forward


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of a batch lie, on the host. V is the largest number of a sample; the rest is padding.

    positions [B, V, 2]: row and column on the token's own grid. grids [B, V, 2]: that grid's height and width.
    groups [B, V] int64: crop or frame of a token, numbered through the sample. images [B, V] int64: which picture of
    the sample. boxes [B, V, 4]: left, top, right, bottom of what the token sees, in parts of its picture.
    """

    positions: Tensor
    grids: Tensor
    groups: Tensor
    images: Tensor
    boxes: Tensor


@dataclass
class Patches:
    """The tokens of one picture, crop or frame on a grid, or of several crops whose rows are packed together.

    A token that sees nothing (a newline) has a box without width.
    """

    positions: Tensor  # [V, 2]
    grid: tuple[float, float]
    boxes: Tensor  # [V, 4]
    image: int
    crops: Tensor | None = None  # [V] int64: the token's crop, counted from 0 among these; None: it is one crop


def grid_patches(height: int, width: int, image: int, area: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> Patches:
    """A full grid in raster order over an area of its picture."""
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    left, top, right, bottom = area
    step_x, step_y = (right - left) / width, (bottom - top) / height
    boxes = torch.stack(
        [left + column * step_x, top + row * step_y, left + (column + 1) * step_x, top + (row + 1) * step_y], 1
    )
    return Patches(torch.stack([row, column], 1).float(), (height, width), boxes.float(), image)


def layout_of(samples: Sequence[Sequence[Patches]], most: int) -> Layout:
    """The layout of a batch from the crops of each sample, in the order of the prompt, padded to `most` tokens."""
    batch = len(samples)
    layout = Layout(
        torch.zeros(batch, most, 2), torch.ones(batch, most, 2), torch.zeros(batch, most, dtype=torch.int64),
        torch.zeros(batch, most, dtype=torch.int64), torch.zeros(batch, most, 4),
    )  # fmt: skip
    for b, crops in enumerate(samples):
        start = group = 0
        for crop in crops:
            here = slice(start, start + len(crop.positions))
            layout.positions[b, here] = crop.positions
            layout.grids[b, here] = torch.tensor(crop.grid, dtype=torch.float32)
            layout.groups[b, here] = group if crop.crops is None else group + crop.crops
            layout.images[b, here] = crop.image
            layout.boxes[b, here] = crop.boxes
            start = here.stop
            group += 1 if crop.crops is None else int(crop.crops.max()) + 1
    return layout


# Nothing large: they are kept until somebody asks for the layout.
LAYOUT_INPUTS = ("input_ids", "attention_mask", "position_ids", "image_grid_thw", "video_grid_thw")


@dataclass(frozen=True)
class Family:
    """Where things are in the models of a family, and how their visual tokens are laid out."""

    name: str
    # the multimodal model, whose forward takes input_ids and pictures
    core: Callable[[Model], Model]
    # its decoder (with .layers and .rotary_emb), called with inputs_embeds
    decoder: Callable[[Model], Model]
    # the ids that stand for visual tokens in input_ids
    visual_ids: Callable[[Any], tuple[int, ...]]
    # (core, inputs, visual tokens per sample) -> layout; of the forward's arguments, it may read LAYOUT_INPUTS
    layout: Callable[[Model, Inputs, list[int]], Layout]
    # what the saliency of methods such as AdaFV needs of the vision tower; None: unsupported
    saliency: "Callable[[Model], Saliency] | None"
    # mRoPE positions carry the image's geometry: they are never renumbered
    renumber: bool = True
    # Methods of the core, and what is remembered of the arguments of their last call: the layout and the saliency find
    # it in their inputs under the method's name. generate may encode the pictures before the forward, and keep what it
    # encoded them with for itself.
    watched: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)


class Saliency:
    """How salient each visual token is to the vision tower. `attention` is probed while the tower runs."""

    def __init__(self, config: Any, attention: nn.Module) -> None:
        self.config, self.attention = config, attention
        self.written_down: Callable[[], list[Any]] = list

    @property
    def seen(self) -> list[Any]:
        """Of the calls of the attention while the pictures of the present call were encoded, in order.

        generate encodes once; without a cache, every step is a prompt of the same features, with what was seen then.
        """
        return self.written_down()

    def see(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None, keywords: dict[str, Any]) -> None:
        """A probe: remember in `seen` what `read` needs of one call of the attention."""
        raise NotImplementedError

    def read(self, core: Model, inputs: Inputs, counts: list[int]) -> Tensor:
        """[B, V] float32 in the order of the prompt, 0 in the padding."""
        raise NotImplementedError


def beam_copies(shown: int, counts: list[int]) -> int:
    """How many samples in a row share what the vision tower showed once.

    Beam search repeats each sample, and newer versions of generate do so after the vision tower has run.
    """
    for copies in range(1, len(counts) + 1):
        once = counts[::copies]
        if sum(once) <= shown and [count for count in once for _ in range(copies)] == counts:
            return copies
    raise RuntimeError(f"prune_visual_tokens: {sum(counts)} visual tokens, but the vision tower showed {shown}")


def by_sample(values: Tensor, counts: list[int]) -> Tensor:
    """[B, V] from one vector over the visual tokens of the batch, one sample after the other; 0 in the padding.

    One stretch serves all copies of a sample (`beam_copies`). Values of earlier runs of the tower, whose prompts never
    came, are in front.
    """
    copies = beam_copies(len(values), counts)
    counts = counts[::copies]
    stretches = values[len(values) - sum(counts) :].float().split(counts)
    padded = [torch.nn.functional.pad(s, (0, max(counts) - len(s))) for s in stretches]
    return torch.stack(padded).repeat_interleave(copies, 0)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *model_types: str) -> None:
    for model_type in model_types:
        _FAMILIES[model_type] = family


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, which passes attributes on and calls the forward of what it wraps."""
    while hasattr(type(model), "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    return model


def family_of(model: nn.Module) -> Family:
    """The family of a model, or an error that names what is supported."""
    config = getattr(unwrapped(model), "config", None)
    return family_of_type(getattr(config, "model_type", None), type(model).__name__)


def family_of_type(model_type: str | None, called: str) -> Family:
    """As `family_of`, from the config alone: before the weights are loaded. called: the model's name in the error."""
    from . import adapters  # noqa: F401  (registers them)

    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise NotImplementedError(
            f"prune_visual_tokens: {called} (model_type {model_type!r}) is not supported; supported are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return family
