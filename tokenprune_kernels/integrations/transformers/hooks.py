"""Putting a block's hooks into a model, and taking them out: what they do is in block.py."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from .attention import ProbedAttention
from .block import Block
from .copies import leave_out_of_copies, ours
from .families import Inputs
from .interface import Arguments, arguments_of
from .kinds import check_kinds
from .registry import unwrapped
from .watch import watch


def install(block: Block, model: nn.Module) -> ExitStack:
    """Closing what is returned takes everything out again, the last first. What raises here leaves nothing behind."""
    with ExitStack() as installed:
        _install(block, model, installed)
        return installed.pop_all()


def _install(block: Block, model: nn.Module, installed: ExitStack) -> None:
    installed.callback(block.forget)
    plan, core, decoder = block.plan, block.plan.core, block.plan.decoder
    family, layers = plan.family, decoder.layers
    check_kinds(decoder.config, family, len(layers))
    deepstack = ["deepstack_visual_embeds"] if family.deepstack else []
    takes = arguments_of(layers[0], "hidden_states", "attention_mask", "position_embeddings", "cache")
    of_decoder = arguments_of(decoder, "inputs_embeds", "attention_mask", "position_ids", "cache", *deepstack)
    of_core = arguments_of(core, "input_ids", "attention_mask", "position_ids", "cache")
    before, after = partial(_before, installed), partial(_after, installed)

    see = _uncompiled(block.see)
    probed = {planned.layer - 1 for planned in plan.stages.values() if planned.stage.reads_attention}
    projecting = _uncompiled(block.projecting)
    block.attention = [ProbedAttention(
        decoder.config, {layers[index].self_attn: see for index in probed},
        {layers[at].self_attn: projecting for at, planned in plan.stages.items() if planned.stage.projects},
    )]  # fmt: skip
    if plan.saliency is not None:
        try:
            found = plan.saliency.attention(core)
        except NotImplementedError as lacking:
            raise NotImplementedError(f"prune_visual_tokens: {plan.method} needs {lacking}") from None
        see_tower = _uncompiled(block.see_tower)
        for attention in found if isinstance(found, tuple) else (found,):
            block.attention.append(ProbedAttention(attention.config, {attention: see_tower}, {}, shared=True))
    for probe in block.attention:
        installed.callback(probe.remove)
        probe.install()
    watch(installed, unwrapped(model), core, block.calls, family, block.follow)

    # Each may be what is called: a PEFT model skips the hooks of the model that it wraps, generate those of PEFT.
    heads = [head for head in dict.fromkeys((model, unwrapped(model))) if head is not core]
    for head in heads:
        before(head, arguments_of(head), block.before_head)
    if "labels" in of_core.names:  # it has a head further down
        before(core, of_core, block.before_head)
    before(core, of_core, partial(block.before_core, of_core))
    after(core, block.after_core)
    before(decoder, of_decoder, partial(block.before_decoder, of_decoder))
    after(decoder, block.after_decoder)
    for index, layer in enumerate(layers):  # all of them: a cache may have been pruned by another method
        before(layer, takes, partial(block.before_layer, index, takes))
    touched = {type(module) for module in (*heads, core, decoder, *layers)}
    if family.deepstack or "logits_to_keep" in of_decoder.names:
        of_norm = arguments_of(decoder.norm)
        before(decoder.norm, of_norm, partial(block.before_norm, of_norm))
        touched.add(type(decoder.norm))
    installed.callback(leave_out_of_copies(touched | {type(probe.config) for probe in block.attention}))


def _before(installed: ExitStack, module: nn.Module, takes: Arguments, hook: Callable[[Inputs], Inputs | None]) -> None:
    """hook(the arguments by name): those that forward gets instead, or None."""

    def run(m: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> Any:
        inputs = hook(takes.bind(args, kwargs))
        return None if inputs is None else takes.split(inputs, len(args))

    installed.callback(module.register_forward_pre_hook(_uncompiled(run), with_kwargs=True).remove)


def _after(installed: ExitStack, module: nn.Module, hook: Callable[[bool], None]) -> None:
    """hook(whether forward came to its end): it runs after an exception too."""

    def run(m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hook(output is not None)

    installed.callback(module.register_forward_hook(_uncompiled(run), always_call=True).remove)


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile leaves hooks to Python: what they remember must not become part of a graph."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return ours(torch.compiler.disable(run))
