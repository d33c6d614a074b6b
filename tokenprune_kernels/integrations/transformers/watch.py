"""Watching methods of one module: what they are called with, and what is called inside."""

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Calls
from .copies import ours
from .encoding import Asked, check_asked
from .families import Family, Inputs, Model

# around(the method, its positional arguments, its keyword arguments) -> what the caller gets
Around = Callable[[Callable[..., Any], tuple[Any, ...], Inputs], Any]


def shadow(module: nn.Module, name: str, around: Around, attribute: str | None = None) -> Callable[[], None]:
    """Calls of `module.name` go through `around`, until the function that is returned is called.

    The method is shadowed by an attribute of this one instance, of the same signature, since generate reads that.
    attribute: where the instance keeps it, of a property that has another name there.
    """
    method, at = getattr(module, name), attribute or name

    # torch.compile goes on inside of the method, and leaves to Python what is remembered around it.
    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return around(method, args, kwargs)

    before = {at: vars(module)[at]} if at in vars(module) else {}
    put = vars(module)[at] = ours(watched, *before.values())

    def remove() -> None:
        # Somebody may have put another in front since, which stays: it calls ours, which still works.
        if vars(module).get(at) is put:
            del vars(module)[at]
            vars(module).update(before)

    return remove


def watch(
    installed: ExitStack, model: Model, core: Model, calls: Calls, family: Family, before: Callable[[], None]
) -> None:
    """Watches generate, what encodes images, the loss and the family's watched methods, until `installed` is closed.

    before: is called before images are encoded.
    """

    def note(name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        here = calls.encoding
        if here is not None and name in family.watched:
            here.arguments[name] = family.watched[name](_given(method, args, kwargs))
        return method(*args, **kwargs)

    def encode(name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        before()
        if calls.encoding_inside:  # get_video_features may call get_image_features
            return method(*args, **kwargs)
        with calls.encode() as encoding:
            features = note(name, method, args, kwargs)
        encoding.left_on(features)
        return features

    def generate(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        with calls.generating(_asked(model, _given(method, args, kwargs))):
            return method(*args, **kwargs)

    def prepare(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        given, inputs = _given(method, args, kwargs), method(*args, **kwargs)
        _keep_padding(given.get("attention_mask"), inputs)
        if calls.asked and inputs.get("inputs_embeds") is not None:
            calls.asked[-1].prompt = given["input_ids"][:, -inputs["inputs_embeds"].shape[1] :]
        return inputs

    def guess(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        guesses, ids = method(*args, **kwargs), _given(method, args, kwargs).get("input_ids")
        visual = family.visual_ids(core.config)
        if ids is None or any(bool((ids == token).any()) for token in visual):
            check_asked(calls.asked[-1])
            _without_guesses_first(guesses)
        return guesses

    def loss(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Any:
        given = {**dict(zip(inspect.signature(method).parameters, args, strict=False)), **kwargs}
        return method(**(calls.heads[-1].of_loss(given) if calls.heads else given))

    for name in dict.fromkeys([*family.encoders, *family.watched]):
        if not hasattr(core, name):
            raise NotImplementedError(
                f"prune_visual_tokens: {type(core).__name__} has no {name}; this version of transformers is not "
                "supported"
            )
        installed.callback(shadow(core, name, functools.partial(encode if name in family.encoders else note, name)))
    if not hasattr(model, "generate"):
        return
    of_generate = {
        "generate": generate, "prepare_inputs_for_generation": prepare, "_get_candidate_generator": guess,
    }  # fmt: skip
    for name, around in of_generate.items():
        if not hasattr(model, name):
            raise NotImplementedError(
                f"prune_visual_tokens: {type(model).__name__} generates without {name}; this version of transformers "
                "is not supported"
            )
        installed.callback(shadow(model, name, around))
    installed.callback(shadow(model, "loss_function", loss, "_loss_function"))


def _keep_padding(mask: Any, inputs: Inputs) -> None:
    """What is handed on with a static cache is the mask that generate was given, [B, L] or None.

    generate makes one [B, 1, T, L] of it, as the model does too, and a prefill needs to know which columns are padding.
    """
    made = inputs.get("attention_mask")
    flat = isinstance(made, Tensor) and made.dim() == 2
    if made is None or flat or (isinstance(mask, Tensor) and mask.dim() != 2):
        return
    where = inputs.get("input_ids")
    where = inputs["inputs_embeds"] if where is None else where
    inputs["attention_mask"] = None if mask is None else mask.to(where.device)


def _without_guesses_first(guesses: Any) -> None:
    """Throws away what a candidate generator guesses behind the prompt, which is pruned in its first forward.

    A choice by the text behind the images must not see guesses, which assisted decoding takes back later.
    """
    if getattr(guesses, "requires_model_outputs", False):
        raise NotImplementedError(
            f"prune_visual_tokens: {type(guesses).__name__} guesses by what the model returned of the prompt, which "
            "lacks the tokens that were dropped; assist by prompt_lookup_num_tokens or by a model of its own"
        )
    get_candidates = guesses.get_candidates

    def nothing_first(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        guesses.get_candidates = get_candidates
        get_candidates(input_ids, *args, **kwargs)  # an assistant model reads the prompt with its first guesses
        return input_ids, None

    guesses.get_candidates = nothing_first


def _given(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
    """The arguments of a call by name, those in **kwargs among them."""
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def _asked(model: Model, given: Inputs) -> Asked:
    """What generate is asked for by its keywords, the configuration it is given, and the model's, in this order."""
    config = copy.copy(given.get("generation_config") or model.generation_config)
    for others in ({n: v for n, v in vars(model.generation_config).items() if vars(config).get(n) is None}, given):
        vars(config).update((name, value) for name, value in others.items() if name in vars(config))
    return Asked(_unfit(config), copies=max(config.num_beams or 1, config.num_return_sequences or 1))


def _unfit(config: Any) -> str | None:
    """Why images cannot be pruned under a configuration of generate, or None."""
    if config.prefill_chunk_size is not None:
        return (
            f"prefill_chunk_size={config.prefill_chunk_size} takes apart what has to come in one forward, the images "
            "and the question about them; generate without prefill_chunk_size"
        )
    if config.assistant_early_exit is not None:
        return (
            f"assistant_early_exit={config.assistant_early_exit} guesses with the pruned model itself, whose guesses "
            "would be pruned prompts of their own; assist by prompt_lookup_num_tokens or by a model of its own"
        )
    if getattr(config.compile_config, "fullgraph", False):
        return "compile_config.fullgraph=True allows no hooks in what is compiled; set it to False"
    return None
