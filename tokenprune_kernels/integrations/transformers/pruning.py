"""`prune_visual_tokens`: the block inside which a model drops visual tokens, and what it tells afterwards."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._convert import as_python
from ...methods import ARGUMENTS, Method, Stage, get_method, method_names
from ...methods._method import Choose
from .block import Block
from .budgets import Budget, Keep, budget_of, check_layer, ending_with, least_of, schedule_of, times
from .choose import check_stage
from .families import Family
from .hooks import install
from .kinds import check_shared
from .masks import check_takes_bias
from .overlay import boxes_of, overlays
from .page import save_page
from .prefill import Plan, PlannedStage
from .registry import family_of, unwrapped
from .saved import by_token
from .targets import Target, budget_within
from .where import check_where, first_from

METHODS = method_names()  # of this package; users may register others
KEEP = 0.222  # of those that name no schedule: the share that most papers compare at
PER = ("sample", "image")
IN_MODEL = tuple(name for name in METHODS if get_method(name).in_model)


def stages_of(
    method: Method, keep: Keep | Mapping[int, Keep] | Target | None, layer: int | None, family: Family, decoder: Any, *,
    per: str | None = None, min_keep: int | None = None,
) -> list[PlannedStage]:  # fmt: skip
    """Where the method chooses, and how many: what works inside the model does so at every layer of a schedule."""
    depth, named = len(decoder.layers), layer is not None or isinstance(keep, Mapping)
    if keep is None:
        keep = (method.scheduled(depth) if layer is None else {}) or KEEP
    if per not in (None, *PER):
        raise ValueError(f"prune_visual_tokens: per must be {' or '.join(PER)}, got {per!r}")
    if per == "image" and not method.within_images:
        raise NotImplementedError(
            f"prune_visual_tokens: {method.name} compares images or frames with each other, which per='image' would "
            "part; give it a budget per sample"
        )
    if per == "image" and isinstance(keep, Target):
        raise NotImplementedError(
            f"prune_visual_tokens: {keep} is what a whole prompt may cost, and per='image' would part it; leave per out"
        )
    least = least_of(min_keep, 1.0 if isinstance(keep, Target) else keep, per)  # a target is bounded as a share is
    if isinstance(keep, Mapping):
        if layer is not None:
            raise ValueError("prune_visual_tokens: a schedule to keep names its layers; layer must be None then")
        schedule = schedule_of(keep, depth, per, least=least)
        return _planned(method, next(iter(schedule)), schedule, decoder.layers, "schedule" if named else "")
    shares = method.scheduled(depth) if layer is None else {}
    if layer is None and method.in_model:
        # The paper's layer, on a model that is deep enough for it.
        layer = max(shares, default=min(method.layers.get(family.name, method.layer), depth - 1))
    at = 0 if layer is None else check_layer(layer, depth)

    def planned(budget: Budget) -> list[PlannedStage]:
        schedule = ending_with(budget, shares or {at: 1.0})
        return _planned(method, layer, schedule, decoder.layers, "layer" if named else "")

    if isinstance(keep, Target):
        return planned(budget_within(keep, decoder, planned, None if min_keep is None else least))
    return planned(budget_of(keep, per, least=least))


def _planned(
    method: Method, layer: int | None, schedule: dict[int, Budget], layers: Sequence[Any], named: str
) -> list[PlannedStage]:
    """named: what of the user's says where, if anything does."""
    inside = [stage.at_layer(layer) for stage in method.stages]
    if layer is not None and not any(inside):
        raise ValueError(f"prune_visual_tokens: {method.name} works before the language model and takes no {named}")

    def at_layers(stage: Stage) -> dict[int, Budget]:
        """By default, the next layers in front of which it can choose; of two that become one, the later counts."""
        return schedule if named else {first_from(stage, layers, at): budget for at, budget in schedule.items()}

    return [
        PlannedStage(at, stage, times(stage.share, budget))
        for stage, there in zip(method.stages, inside, strict=True)
        for at, budget in (at_layers(stage).items() if there else [(0, schedule[min(schedule)])])
    ]


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
        keep: Keep | Mapping[int, Keep] | Target | None = None,
        *,
        per: str | None = None,
        min_keep: int | None = None,
        layer: int | None = None,
        positions: str | None = None,
        calibrate: bool = False,
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
        method = get_method(method, caller="prune_visual_tokens")
        stages = stages_of(method, keep, layer, family, decoder, per=per, min_keep=min_keep)
        check_options(method, options or {})
        if positions is None:
            positions = "original" if family.mrope else method.positions
        if "saliency" in method.uses and family.saliency is None:
            raise NotImplementedError(f"prune_visual_tokens: {method.name} has no saliency for {family.name}")
        if not isinstance(calibrate, bool):
            raise TypeError(f"prune_visual_tokens: calibrate must be a bool, got {calibrate!r}")
        if calibrate:
            check_takes_bias(decoder.config)
        seed = as_python(seed)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"prune_visual_tokens: seed must be an int or None, got {seed!r}")
        for planned in stages:
            check_where(method.name, planned.stage, decoder.layers, planned.layer)
            check_stage(method.name, planned.stage, decoder.layers[planned.layer], family)
            check_shared(decoder.config, decoder.layers, planned.layer)
        self.method, self.model = method.name, model
        self.title = method.title or method.name
        self._block = Block(Plan(
            family, core, decoder, method.name, {planned.layer: planned for planned in stages},
            per_image=per == "image", saliency=family.saliency if "saliency" in method.uses else None,
            renumber=positions == "renumber", calibrate=calibrate, compact_cache=compact_cache, seed=seed,
            options=options or {},
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
        """What was left in front of each pruning layer, as `kept`: of sts and of schedules several."""
        return self._block.report.kept_at

    def budget(self, visual: int, text: int) -> dict[int, int]:
        """What `keep` comes to for a prompt of so many visual tokens and so many others: how many visual tokens are
        left from each pruning layer on. Nothing has to run for it; with `per="image"` the prompt has one image."""
        left, stages = visual, sorted(self._block.plan.stages.items())
        return {layer: (left := min(left, *planned.budget([visual], [text]))) for layer, planned in stages}

    @property
    def stats(self) -> dict[str, Any]:
        """Facts of the prefill that was finished last: tokens before and after per sample, pruning layers, times, the
        backend.

        The times are milliseconds of the device; reading them waits for it.
        """
        return {"method": self.method, **self._block.report.stats()}

    @property
    def saved(self) -> dict[int, dict[str, Tensor]]:
        """What the method told of its choice in front of each pruning layer: [B, V] on the host, of the V visual tokens
        of the prompt. Its scores by name, in float32, NaN where a token has none (`details` of its function say which
        there are); and `rank`, where it picks one token after the other: from 0 on, -1 for what was not picked."""
        report = self._block.report
        return {layer: by_token(told, report.before) for layer, told in report.told_at.items()}

    def boxes(self, *, sample: int = 0, image_index: int = 0) -> Tensor:
        """[K, 4]: left, top, right and bottom, in parts of the image, of what each kept token sees of it.

        image_index: which of the sample's images or frames it is. Tokens of other images and of newlines have no row.
        """
        return boxes_of(self._block.report, sample, image_index)

    def overlay(self, image: Any, *, sample: int = 0, image_index: int = 0) -> Any:
        """The image with everything darkened that no kept token sees (`boxes`); a PIL image. Needs Pillow.

        image: a PIL image, an array [height, width, 3] of bytes, or anything PIL opens; or all images of the sample, or
            the frames of its video, as a list or an array [frames, height, width, 3]: a panel for each of them.
        sample, image_index: which image of which sample it is, or the first one.
        """
        return overlays(self._block.report, image, sample, image_index)

    def save_html(
        self, path: str | PathLike[str], image: Any, *, sample: int = 0, image_index: int = 0,
        others: Sequence["Pruning"] = (),
    ) -> None:  # fmt: skip
        """Writes one page, a file that needs no other: the image, a slider over the order in which the method picked
        what it kept, or over its scores, and a switch to the methods of `others`. Needs Pillow and jinja2.

        image, sample, image_index: as of `overlay`. others: blocks of other methods that pruned the same prompt.

        Raises:
            ValueError: another block pruned another prompt.
        """
        blocks = [(block.title, block._block.report) for block in (self, *others)]
        save_page(Path(path), blocks, image, sample, image_index)


def prune_visual_tokens(
    model: nn.Module,
    method: str | Method | Choose = "coast",
    keep: Keep | Mapping[int, Keep] | Target | None = None,
    *,
    per: str | None = None,
    min_keep: int | None = None,
    layer: int | None = None,
    positions: str | None = None,
    calibrate: bool = False,
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
        keep: visual tokens to keep per sample, an int, or the share of them, a float in (0, 1]; with `per`, a list has
            one of these for each sample or image of a call. Scalars and vectors of NumPy and torch are as good. Or a
            schedule, {layer: one of these}: of the prompt's visual tokens so many are kept from that decoder layer on,
            shares rounded down. Layers ascend, and what is kept does not grow. Or what the decoder's prefill may cost,
            `Flops(share)` or `Milliseconds(limit, measured)`. Default: the paper's schedule (pyramiddrop), or 0.222;
            with one number, its last layer keeps that, those before in proportion.
        per: what `keep` is the budget of: "sample", all visual tokens of a sample together, or "image", each image or
            frame of a video by itself, which the method then chooses within. A list has to come with it: per "sample"
            a number for each of the batch, per "image" for each of the call in the order of the prompts.
        min_keep: what a share keeps at least of a sample or image. Default: 1.
        layer: for methods that work inside the model: the decoder layer in front of which tokens are dropped, by the
            attention of the layer before it. Default: the paper's, or 2, or the next one where there is the attention
            that is read (linear attention and convolutions have none). A function that asks for none works in front
            of the language model unless a layer is given.
        positions: `original` keeps the rotary positions of what stays, `renumber` numbers it anew wherever tokens are
            dropped: the layers from there on see consecutive positions, those before them the prompt's, while decoding
            too (one-dimensional positions only). Default: as the method's paper has it.
        calibrate: of methods that merge what they drop and say how many tokens a row stands for: add log s to the
            logits of a key that is made of s tokens, in all layers from the merge on. Needs sdpa or eager attention.
        compact_cache: drop the same tokens from the key/value cache of the layers before the pruning layer too.
        seed: of methods that draw, as random does; prefills draw from it one after the other, those of several threads
            in any order.
        options: further keywords of the method's function, for instance of those in `tokenprune_kernels.methods`.

    Returns:
        a context manager; what it yields has `kept`, `stats`, `saved`, `budget()`, `boxes()`, `overlay(image)` and
        `save_html(path, image)`.

    The model's attention function (sdpa, FlashAttention, flex, eager) goes on doing the attention. Prompts are pruned
    in their prefill, once; outputs then have fewer columns, padded on the left where samples differ, so read logits
    from the right end, as generate does. One block serves several threads.

    Raises:
        NotImplementedError: a model, cache or mask that is not supported, with what is.
        ValueError, TypeError: an argument is wrong.
        RuntimeError: the model is in such a block already.
    """
    return Pruning(
        model, method, keep, per=per, min_keep=min_keep, layer=layer, positions=positions, calibrate=calibrate,
        compact_cache=compact_cache, seed=seed, options=options,
    )  # fmt: skip
