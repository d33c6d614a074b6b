"""PyramidDrop: the coming layer's own queries and keys, and the schedule that is its default."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import models_towers, runs_crops, runs_qwen
from tests.transformers.vlm.checks import assert_decoded_like_the_oracle, drops_of, generate
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

FAMILIES: dict[str, Callable[[], Prompts]] = {
    "llava": lambda: llava(2, ragged=True),
    "eager": lambda: llava(2, ragged=True, attention="eager"),
    "fused": models_towers.fused,
    "granite": models_towers.granite,
    **{name: lambda name=name: runs_qwen.batch(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{name: lambda name=name: runs_crops.prompts_of(name, "several") for name in ("llava_onevision", "internvl")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_own_queries_and_keys_are_those_that_it_attends_with(family: str) -> None:
    """In front of layer 2, against those that its attention is seen to get where layer 3 is the pruning layer."""
    prompts, seen = FAMILIES[family](), []

    def in_advance(next_query: Tensor, next_key: Tensor, next_scale: float, present: Tensor, k: int) -> Tensor:
        seen.append((next_query, next_key, torch.tensor(next_scale)))
        return torch.arange(k).expand(len(present), k)

    def afterwards(query: Tensor, key: Tensor, scale: float, present: Tensor, k: int) -> Tensor:
        return in_advance(query, key, scale, present, k)

    with torch.no_grad():
        for function, layer in ((in_advance, 2), (afterwards, 3)):
            with prune_visual_tokens(prompts.model, function, 3, layer=layer):
                prompts.model(**prompts.inputs)
    for got, want in zip(*seen, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("compact", [False, True])
def test_the_default_is_the_papers_schedule(compact: bool) -> None:
    prompts = llava(3, ragged=True)
    with prune_visual_tokens(prompts.model, "pyramiddrop", compact_cache=compact) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == {1: 18, 2: 9, 3: 4}
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, 0, compact), out, renumber=True)


@pytest.mark.parametrize("positions", ["original", "renumber"])
def test_every_stage_keeps_the_best_of_its_own_layers_attention(positions: str) -> None:
    """Scores by hand in float64 from the weights, of the layer's input that a hook sees."""
    prompts = llava(1)
    decoder = prompts.model.model.language_model
    inputs: dict[int, Any] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out, i=i: inputs.update({i + 1: out}))
        for i, layer in enumerate(decoder.layers)
    ]
    with (
        torch.no_grad(),
        prune_visual_tokens(prompts.model, "pyramiddrop", {2: 12, 3: 5}, positions=positions) as pruning,
    ):
        prompts.model(**prompts.inputs)
    for handle in handles:
        handle.remove()
    visual = (prompts.inputs["input_ids"][0] == prompts.visual).nonzero().flatten()
    position = column = torch.arange(prompts.inputs["input_ids"].shape[1])
    left = torch.arange(len(visual))
    for at in (2, 3):
        hidden = inputs[at][0] if isinstance(inputs[at], tuple) else inputs[at]
        layer = decoder.layers[at]
        normed = layer.input_layernorm(hidden)
        cos, sin = decoder.rotary_emb(hidden, position_ids=position[None])
        split = (*hidden.shape[:2], -1, layer.self_attn.head_dim)
        query, key = (
            turned(getattr(layer.self_attn, name)(normed).view(split).transpose(1, 2).double(), cos, sin)
            for name in ("q_proj", "k_proj")
        )
        logits = query[0, :, -1:] @ key[0].repeat_interleave(2, 0).mT * layer.self_attn.head_dim**-0.5
        columns = torch.isin(column, visual[left]).nonzero().flatten()
        best = logits.softmax(-1).mean(0)[0][columns].topk(pruning.kept_at[at].shape[1]).indices.sort().values
        left = left[best]
        assert torch.equal(pruning.kept_at[at][0], left)
        column = column[~torch.isin(column, visual) | torch.isin(column, visual[left])]
        position = column if positions == "original" else torch.arange(len(column))


def turned(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return t * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def test_one_number_is_what_the_last_stage_keeps() -> None:
    prompts = llava(1)
    for keep, counts in ((3, {1: 12, 2: 6, 3: 3}), (0.25, {2: 18, 3: 9}), (20, {3: 20})):
        with torch.no_grad(), prune_visual_tokens(prompts.model, "pyramiddrop", keep) as pruning:
            prompts.model(**prompts.inputs)
        assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == counts
    with torch.no_grad(), prune_visual_tokens(prompts.model, "pyramiddrop", 9, layer=2) as pruning:
        prompts.model(**prompts.inputs)
    assert pruning.stats["layers"] == [2]


def test_the_own_projections_are_refused_where_no_norm_is_in_front_of_the_attention() -> None:
    model = llava().model
    layer = model.model.language_model.layers[2]
    layer.norm_in_front, layer.input_layernorm = layer.input_layernorm, None
    del layer.input_layernorm
    with pytest.raises(NotImplementedError, match="pyramiddrop reads queries and keys of the layer that comes"):
        prune_visual_tokens(model, "pyramiddrop", 9, layer=2)
    assert methods.get_method("pyramiddrop").stages[0].projects
