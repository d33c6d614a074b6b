"""Which tokens of an image stay: a method's function, given what is known in front of the language model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ... import gather_compact
from ...methods import Stage, get_method, method_names
from ..transformers.budgets import Budget, budget_of
from ..transformers.choose import LayerContext, choose
from ..transformers.layout import Layout
from ..transformers.tokens import Tokens
from .setting import VARIABLE, Setting

# The names in `methods.ARGUMENTS` of what an image has before any question is known: the engine shares what an encoder
# makes of an image among all requests that show it.
OF_IMAGES = frozenset({
    "features", "visual_embeddings", "saliency", "positions", "grid", "groups", "stacked_positions", "generator",
    "mask", "present", "n", "count",
})  # fmt: skip


def served() -> dict[str, Stage]:
    """The functions that need no question, in front of the language model: of a method that has no other by its name,
    of one that goes on inside the model by the function's."""
    found = {}
    for name in method_names():
        first, *later = get_method(name).stages
        if not first.at_layer(None) and first.uses - frozenset(first.optional) <= OF_IMAGES:
            found[first.name if later else name] = first
    return found


def check_setting(setting: Setting) -> Stage:
    """The function that a setting names.

    Raises:
        ValueError: there is none of this name that needs no question.
        TypeError: it takes no such option, or lacks one.
    """
    stages = served()
    if setting.method not in stages:
        why = ""
        if setting.method in method_names():
            stage, *later = get_method(str(setting.method)).stages
            inside = f"; its first part is {stage.name}" if stage.name in stages else ""
            needs = ", ".join(sorted(stage.uses - OF_IMAGES))
            why = f", which works inside the language model{inside}" if later else f", which asks for {needs}"
        raise ValueError(
            f"{VARIABLE}: method must choose by the image alone, as {', '.join(stages)} do, got {setting.method!r}{why}"
        )
    stage = stages[setting.method]
    unknown = sorted(set(setting.options) - set(stage.options))
    if unknown:
        raise TypeError(
            f"{VARIABLE}: {setting.method} takes no option {unknown[0]!r}; its options are {', '.join(stage.options)}"
        )
    missing = [n for n, has_default in stage.options.items() if not has_default and n not in setting.options]
    if missing:
        raise TypeError(f"{VARIABLE}: {setting.method} needs {missing[0]!r}")
    return stage


@dataclass(frozen=True)
class Images:
    """What is known of images with equally many tokens. Callables: made when a method asks for it.

    features [B, V, C]: what the projector made. layout: of these images, on their device. saliency [B, V] float32.
    """

    features: Tensor
    layout: Callable[[], Layout]
    saliency: Callable[[], Tensor]


class Chooser:
    """The setting of this process, checked and ready to be applied."""

    def __init__(self, setting: Setting) -> None:
        assert setting.keep is not None
        self.setting = setting
        self.stage = check_setting(setting)
        self.budget: Budget = budget_of(setting.keep)

    def __call__(self, images: Images) -> tuple[Tensor, Tensor]:
        """(indices [B, K] of the kept tokens, ascending, rows [B, K, C] that take their places)."""
        batch, count = images.features.shape[:2]
        (kept,) = self.budget([count])
        columns = torch.arange(count, device=images.features.device).repeat(batch, 1)
        if kept == count:
            return columns, images.features
        lengths = [count] * batch
        # A prompt that is the image: no text, so that a method for which a question is optional gets none.
        tokens = Tokens(columns, columns, lengths, None, lengths, columns, suffix=0)
        context = LayerContext(
            tokens, images.features, None, None, _no_layer, _no_layer, images.layout, images.saliency,
            lambda: torch.Generator(images.features.device).manual_seed(self.setting.seed),
        )  # fmt: skip
        chosen = choose(self.stage, context, [[count]] * batch, [[kept]] * batch, self.setting.options)
        if chosen.merged is not None:
            return chosen.indices, chosen.merged
        return chosen.indices, gather_compact([images.features], chosen.indices, dims=[1])[0]

    @property
    def reads_saliency(self) -> bool:
        return "saliency" in self.stage.uses

    @property
    def one_by_one(self) -> bool:
        """Whether images are chosen from one after the other: of those of a batch, each would draw other numbers."""
        return "generator" in self.stage.uses


def _no_layer() -> NoReturn:
    raise RuntimeError("there is no decoder layer in front of the language model")
