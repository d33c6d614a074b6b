"""Models that are tensor-parallel or sharded by FSDP2, as each of two ranks runs them, beside the whole model."""

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from tests.distributed.ranks import Cases
from tests.transformers.test_attention import plain_attention, registered
from tests.transformers.vlm.checks import generate, options_of
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels.integrations.transformers import parallel, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.pruning import METHODS

ATTENTION = {"q_proj": ColwiseParallel, "k_proj": ColwiseParallel, "v_proj": ColwiseParallel}
KEEP = 9
# Logits are below 1. Sums over the ranks have another order.
CLOSE = {"rtol": 0.0, "atol": 1e-6}
EQUAL = {"rtol": 0.0, "atol": 0.0}


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def whole() -> Prompts:
    return llava(2, ragged=True)


@functools.cache
def by_transformers() -> Any:
    """What `from_pretrained(..., tp_plan="auto")` makes, which reads weights from a disk and needs accelerate."""
    model = copy.deepcopy(whole().model)
    return apply_tensor_parallelism(model, mesh(), model._expand_parallel_plan(model.tp_plan))


@functools.cache
def by_torch() -> Any:
    """The attentions of the decoder and of the vision tower, by torch's own tensor parallelism."""
    model = copy.deepcopy(whole().model)
    for layers, out in (
        (model.model.language_model.layers, "o_proj"),
        (model.model.vision_tower.encoder.layers, "out_proj"),
    ):
        for layer in layers:
            plan = {name: style() for name, style in ATTENTION.items()}
            parallelize_module(layer.self_attn, mesh(), {**plan, out: RowwiseParallel()})
    return model


@functools.cache
def by_fsdp() -> Any:
    model = copy.deepcopy(whole().model)
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh())
    return model


def answers(model: Any, method: str, **options: Any) -> tuple[torch.Tensor, Any]:
    """The kept tokens, and three steps of generation with their logits."""
    with torch.no_grad(), prune_visual_tokens(model, method, KEEP, **options_of(method), **options) as pruning:
        out = generate(model, whole().inputs, 3)
    assert pruning.kept is not None
    return pruning.kept, out


def same_as_the_whole_model(make: Callable[[], Any], close: dict[str, float], method: str) -> None:
    kept, out = answers(make(), method, seed=3)
    want_kept, want = answers(whole().model, method, seed=3)
    assert torch.equal(kept, want_kept)
    assert torch.equal(out.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(want.logits), **close)


def fsdp_of_the_root() -> None:
    """Everything is sharded, the embedding and the projector too; transformers' generate cannot run such a model."""
    model = fully_shard(copy.deepcopy(whole().model), mesh=mesh())
    for method in ("coast", "adaptprune", "divprune"):
        got = []
        for m in (model, whole().model):
            with torch.no_grad(), prune_visual_tokens(m, method, KEEP, **options_of(method)) as pruning:
                got.append((m(**whole().inputs).logits, pruning.kept))
        assert torch.equal(got[0][0], got[1][0])
        assert torch.equal(got[0][1], got[1][1])


def what_is_gathered() -> None:
    """Queries and keys of one layer, once per prefill; nothing by a method that reads none."""
    for method, times in (("coast", 2), ("fastv", 2), ("adaptprune", 3), ("divprune", 0), ("adafv", 0)):
        with patch.object(parallel, "_gathered", wraps=parallel._gathered) as gathered:
            answers(by_transformers(), method)
        assert gathered.call_count == times, (method, gathered.call_count)


def random_without_a_seed() -> None:
    """Ranks whose own generators differ draw the same tokens."""
    torch.manual_seed(dist.get_rank())
    kept, _ = answers(by_transformers(), "random")
    others = [torch.empty_like(kept) for _ in range(dist.get_world_size())]
    dist.all_gather(others, kept)
    assert all(torch.equal(kept, other) for other in others)
    again, _ = answers(by_transformers(), "random")
    assert not torch.equal(kept, again)


def a_lse_that_attention_offers() -> None:
    with registered("with_lse", plain_attention, None):
        models = [by_transformers(), whole().model]
        for model in models:
            model.set_attn_implementation("with_lse")
        try:
            one = {name: t[:1, -50:] if name != "pixel_values" else t[:1] for name, t in whole().inputs.items()}
            kept = []
            for model in models:
                with torch.no_grad(), prune_visual_tokens(model, "sts", KEEP, layer=2) as pruning:
                    model(**one)
                kept.append(pruning.kept)
            assert torch.equal(kept[0], kept[1])
        finally:
            for model in models:
                model.set_attn_implementation("sdpa")


def gradients() -> None:
    """With gradients, transformers' linear layers go through DTensors."""
    model = by_transformers()
    with prune_visual_tokens(model, "adaptprune", KEEP, **options_of("adaptprune")) as pruning:
        model(**whole().inputs).logits[:, -1].square().sum().backward()
    want, _ = answers(whole().model, "adaptprune")
    assert torch.equal(pruning.kept, want)


ALONE = (fsdp_of_the_root, what_is_gathered, random_without_a_seed, a_lse_that_attention_offers, gradients)
CASES: Cases = {
    **{f"tensor-parallel {m}": partial(same_as_the_whole_model, by_transformers, CLOSE, m) for m in METHODS},
    **{f"by torch {m}": partial(same_as_the_whole_model, by_torch, CLOSE, m) for m in ("coast", "adaptprune", "adafv")},
    **{f"fsdp {m}": partial(same_as_the_whole_model, by_fsdp, EQUAL, m) for m in METHODS},
    **{case.__name__: case for case in ALONE},
}
