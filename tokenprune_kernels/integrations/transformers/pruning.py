"""`prune_visual_tokens`: the block inside which a model drops visual tokens, and what it tells afterwards."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ...methods import ARGUMENTS, Method, Stage, get_method, method_names
from ...methods._method import Choose
from .block import Block
from .choose import check_layer
from .families import Family
from .hooks import install
from .overlay import boxes_of, overlay
from .prefill import Plan, PlannedStage
from .registry import family_of, unwrapped

METHODS = method_names()  # of this package; users may register others
IN_MODEL = tuple(name for name in METHODS if get_method(name).in_model)


def as_python(number: Any) -> Any:
    """The scalars of NumPy and torch as Python's numbers; anything else as it is."""
    return number.item() if getattr(number, "shape", None) == () else number


def budget_of(keep: int | float) -> Callable[[int], int]:
    """How many of a sample's visual tokens stay: a count, or a ratio of what there is, rounded, at least one."""
    keep = as_python(keep)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"prune_visual_tokens: keep must be an int (tokens) or a float (ratio), got {keep!r}")
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"prune_visual_tokens: keep must be at least 1 token, got {keep}")
        return lambda tokens: min(keep, tokens)
    if not 0 < keep <= 1:
        raise ValueError(f"prune_visual_tokens: a ratio to keep must lie in (0, 1], got {keep}")
    return lambda tokens: min(tokens, max(1, round(keep * tokens)))


def stages_of(
    method: Method, budget: Callable[[int], int], layer: int | None, family: Family, depth: int
) -> list[PlannedStage]:
    """Where the method chooses, and how many."""
    inside = [stage.at_layer(layer) for stage in method.stages]
    if not any(inside):
        if layer is not None:
            raise ValueError(f"prune_visual_tokens: {method.name} works before the language model and takes no layer")
        layer = 0
    else:
        layer = as_python(layer)
        if layer is None:
            # The paper's layer, on a model that is deep enough for it.
            layer = min(method.layers.get(family.name, method.layer), depth - 1)
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < depth:
            raise ValueError(f"prune_visual_tokens: layer must lie in [1, {depth - 1}] for this model, got {layer!r}")

    def planned(stage: Stage, there: bool) -> PlannedStage:
        return PlannedStage(layer if there else 0, stage, lambda tokens: min(tokens, stage.share * budget(tokens)))

    return [planned(*each) for each in zip(method.stages, inside, strict=True)]


def check_options(method: Method, options: dict[str, Any]) -> None:
    """Options are those parameters of the method's functions that they are not given here."""
    known = dict.fromkeys(name for stage in method.stages for name in stage.options)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"prune_visual_tokens: {method.name} takes no option {unknown[0]!r}; its options are {', '.join(known)}"
        )
    for stage in method.stages:
        for name, has_default in stage.options.items():
            if not has_default and name not in options:
                raise TypeError(
                    f"prune_visual_tokens: {stage.name} needs {name!r}, which is no option that was given and none of "
                    f"{', '.join(ARGUMENTS)}"
                )


class Pruning:
    """The handle of a `with prune_visual_tokens(...)` block; see there.

    kept: [B, K] int64, the indices of the kept tokens among each sample's visual tokens in the prompt, ascending, -1
    after the last; None before the first image. Of the prefill that was finished last.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method | Choose,
        keep: int | float,
        *,
        layer: int | None = None,
        positions: str | None = None,
        compact_cache: bool = False,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        family = family_of(model)
        core = family.core(unwrapped(model))
        decoder: Any = family.decoder(core)
        if positions not in (None, "original", "renumber"):
            raise ValueError(f"prune_visual_tokens: positions must be original or renumber, got {positions!r}")
        if positions == "renumber" and family.mrope:
            raise ValueError(
                f"prune_visual_tokens: the positions of {family.name} carry the image's geometry: original"
            )
        budget = budget_of(keep)
        method = get_method(method, caller="prune_visual_tokens")
        stages = stages_of(method, budget, layer, family, len(decoder.layers))
        check_options(method, options or {})
        in_model = any(planned.layer > 0 for planned in stages)
        if positions is None:
            positions = "original" if family.mrope or in_model else method.positions
        if positions == "renumber" and in_model:
            raise ValueError(
                f"prune_visual_tokens: {method.name} prunes inside the model, where positions are fixed already"
            )
        if "saliency" in method.uses and family.saliency is None:
            raise NotImplementedError(f"prune_visual_tokens: {method.name} has no saliency for {family.name}")
        seed = as_python(seed)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"prune_visual_tokens: seed must be an int or None, got {seed!r}")
        for planned in stages:
            check_layer(method.name, planned.stage, decoder.layers[planned.layer])
        self.method, self.model = method.name, model
        self._block = Block(Plan(
            family, core, decoder, method.name, {planned.layer: planned for planned in stages},
            saliency=family.saliency if "saliency" in method.uses else None,
            renumber=positions == "renumber", compact_cache=compact_cache, seed=seed, options=options or {},
        ))  # fmt: skip
        self._installed: ExitStack | None = None

    def __enter__(self) -> "Pruning":
        if self._installed is not None:
            raise RuntimeError("prune_visual_tokens: this block is being entered a second time before it was left")
        self._installed = install(self._block, self.model)
        return self

    def __exit__(self, *exception: object) -> None:
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.close()

    @property
    def kept(self) -> Tensor | None:
        return self._block.report.kept

    @property
    def kept_at(self) -> dict[int, Tensor]:
        """What was left in front of each pruning layer, as `kept`: sts prunes twice."""
        return self._block.report.kept_at

    @property
    def stats(self) -> dict[str, Any]:
        """Facts of the prefill that was finished last: tokens before and after per sample, pruning layers, times, the
        backend.

        The times are milliseconds of the device; reading them waits for it.
        """
        return {"method": self.method, **self._block.report.stats()}

    def boxes(self, *, sample: int = 0, image_index: int = 0) -> Tensor:
        """[K, 4]: left, top, right and bottom, in parts of the image, of what each kept token sees of it.

        image_index: which of the sample's images or frames it is. Tokens of other images and of newlines have no row.
        """
        report = self._block.report
        if report.kept is None or report.layout is None:
            raise RuntimeError("prune_visual_tokens: nothing was pruned yet")
        return boxes_of(report.layout(), report.kept, sample, image_index)

    def overlay(self, image: Any, *, sample: int = 0, image_index: int = 0) -> Any:
        """The image with everything darkened that no kept token sees (`boxes`); a PIL image. Needs Pillow.

        image: a PIL image, or anything PIL opens. sample, image_index: which image of which sample it is.
        """
        return overlay(image, self.boxes(sample=sample, image_index=image_index))


def prune_visual_tokens(
    model: nn.Module,
    method: str | Method | Choose = "coast",
    keep: int | float = 0.222,
    *,
    layer: int | None = None,
    positions: str | None = None,
    compact_cache: bool = False,
    seed: int | None = None,
    **options: Any,
) -> Pruning:
    """Inside the block, prompts with images lose visual tokens where the method's paper drops them.

    Args:
        model: a transformers vision-language model (docs/transformers.md lists the families), with its language
            modelling head or without.
        method: the name of a method (`METHODS`, or one of `tokenprune_kernels.methods.register_method`), or a function:
            it takes `k` and, by the names of its parameters, what it asks for of
            `tokenprune_kernels.methods.ARGUMENTS`, and returns indices [B, k] of visual tokens or a `Selection`.
        keep: visual tokens to keep per sample, an int, or the share of them, a float in (0, 1]; scalars of NumPy and
            torch are as good.
        layer: for methods that work inside the model: the decoder layer in front of which tokens are dropped, by the
            attention of the layer before it. Default: the paper's, or 2. A function that asks for no attention works in
            front of the language model unless a layer is given.
        positions: `original` keeps the rotary positions of what stays, `renumber` numbers it anew (before the language
            model, one-dimensional positions only). Default: as the method's paper has it.
        compact_cache: drop the same tokens from the key/value cache of the layers before the pruning layer too.
        seed: of methods that draw, as random does; prefills draw from it one after the other, those of several threads
            in any order.
        options: further keywords of the method's function, for instance of those in `tokenprune_kernels.methods`.

    Returns:
        a context manager; what it yields has `kept`, `stats`, `boxes()` and `overlay(image)`.

    The model's attention function (sdpa, FlashAttention, flex, eager) goes on doing the attention. Prompts are pruned
    in their prefill, once; outputs then have fewer columns, padded on the left where samples differ, so read logits
    from the right end, as generate does. One block serves several threads.

    Raises:
        NotImplementedError: a model, cache or mask that is not supported, with what is.
        ValueError, TypeError: an argument is wrong.
        RuntimeError: the model is in such a block already.
    """
    return Pruning(
        model, method, keep, layer=layer, positions=positions, compact_cache=compact_cache, seed=seed, options=options
    )
