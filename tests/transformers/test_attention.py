"""The attention behind a block, training through it, and half precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    IN_MODEL,
    LAYER,
    WITHOUT_MERGING,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    spy_on,
)
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens

over_methods = pytest.mark.parametrize("method", METHODS)


def logits_of(prompts: Prompts, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prompts.model(**{**prompts.inputs, **more}).logits
    return logits


# --- the attention behind the block -----------------------------------------------------------------------------------


@contextmanager
def registered(name: str, function: Callable[..., Any], mask: Callable[..., Any] | None) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    if mask is not None:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        yield
    finally:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(name, None)


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention that gives its log-sum-exp. mask [B, N] or [B, 1, M, N] or None."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    logits = query @ key.mT * scaling
    if getattr(module, "is_causal", True):
        rows, columns = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(rows, columns).triu(columns - rows + 1).bool(), -torch.inf)
    if mask is not None:
        mask = mask[:, None, None].bool() if mask.dim() == 2 else mask
        logits = logits.masked_fill(~mask, -torch.inf)
    out = logits.softmax(-1).nan_to_num(0.0) @ value
    return out.transpose(1, 2).contiguous(), logits.logsumexp(-1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@over_methods
def test_eager_and_sdpa_attention(method: str, attention: str) -> None:
    prompts = llava(2, ragged=True, attention=attention)
    with prune_visual_tokens(prompts.model, method, 9, positions="original", **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 3)
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out)


def test_the_users_attention_runs_once_per_layer() -> None:
    prompts = llava(2, ragged=True)
    calls: list[tuple[str, int | None]] = []

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((type(module).__name__, getattr(module, "layer_idx", None)))
        return plain_attention(module, *args, **kwargs)

    with registered("counted", counted, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]):
        prompts.model.set_attn_implementation("counted")
        with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
            out = generate(prompts.model, prompts.inputs, 3)
        in_tower = [c for c in calls if c[0].startswith("CLIP")]
        assert len(in_tower) == 3
        assert [c[1] for c in calls if c not in in_tower] == [0, 1, 2, 3] * 3
        prompts.model.set_attn_implementation("sdpa")
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out)


@pytest.mark.parametrize("method", ["coast", "fastv", "adaptprune", "sts"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_log_sum_exp_that_the_attention_gives_is_used(
    method: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = llava(batch, ragged=True)
    given: list[Any] = []
    name = "sts_semantics" if method == "sts" else method
    real = getattr(methods, name)

    def spied(**kwargs: Any) -> Any:
        given.append((kwargs["lse"], kwargs["query"], kwargs["key"], kwargs["scale"]))
        return real(**kwargs)

    with prune_visual_tokens(prompts.model, method, 9, layer=LAYER) as without:
        logits_of(prompts)
    spy_on(monkeypatch, method, name, spied)
    for dtype, used in ((torch.float32, True), (torch.bfloat16, False)):

        def rounded(*args: Any, to: torch.dtype = dtype, **kwargs: Any) -> Any:
            out, lse = plain_attention(*args, **kwargs)
            return out, lse.to(to)

        given.clear()
        with registered("with_lse", rounded, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]):
            prompts.model.set_attn_implementation("with_lse")
            with prune_visual_tokens(prompts.model, method, 9, layer=LAYER) as pruning:
                logits_of(prompts)
            prompts.model.set_attn_implementation("sdpa")
        lse, query, key, scale = given[0]
        assert (lse is not None) == used
        assert torch.equal(pruning.kept, without.kept)
        if used:
            rows, columns = query.shape[2], key.shape[2]
            logits = query @ key.repeat_interleave(2, 1).mT * scale
            hidden = torch.ones(rows, columns).triu(columns - rows + 1).bool()
            if batch > 1:
                hidden = hidden | ~prompts.inputs["attention_mask"].bool()[:, None, None, -columns:]
            if method != "sts":  # whose second stage sees fewer columns than the mask has
                torch.testing.assert_close(lse, logits.masked_fill(hidden, -torch.inf).logsumexp(-1), **CLOSE)


@pytest.mark.parametrize("method", ["coast", "divprune", "sts"])
@pytest.mark.parametrize("name", ["my_flash", "flash_attention_2"])
def test_flash_attention_finds_its_name_and_no_positions_with_gaps(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second name is transformers' own function, with plain attention in place of the library that it calls."""
    prompts = llava(3, ragged=True)
    config = prompts.model.config.text_config
    seen: list[tuple[str, int, Any, Any, int]] = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(
            (module.config._attn_implementation, module.layer_idx, kwargs.get("position_ids"), mask, key.shape[2])
        )
        return plain_attention(module, query, key, value, mask, **kwargs)[0], None

    def library(query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        seen.append(
            (kwargs["attn_implementation"], kwargs["layer_idx"], kwargs.get("position_ids"), mask, key.shape[1])
        )
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return plain_attention(None, query, key, value, mask, kwargs["softmax_scale"])[0]

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", library)
    with registered("my_flash", flash, flash_attention_mask):
        config._attn_implementation = name
        with prune_visual_tokens(prompts.model, method, 0.3, **options_of(method)) as pruning:
            assert "flash" in config._attn_implementation  # by that word the model decides what attention gets
            out = generate(prompts.model, prompts.inputs, 4)
        assert config._attn_implementation == name
        config._attn_implementation = "sdpa"
    first = 0 if method != "coast" else LAYER
    assert len(seen) == 4 * 4
    for called, layer, positions, mask, keys in seen:
        assert called == name
        assert layer < first or positions is None
        assert tuple(mask.shape) == (3, keys)
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out)


def test_an_attention_without_a_mask_function_gets_no_mask() -> None:
    prompts = llava(2)
    with registered("maskless", plain_attention, None):
        prompts.model.set_attn_implementation("maskless")
        with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
            out = generate(prompts.model, prompts.inputs, 3)
        uneven = llava(2, ragged=True).inputs
        message = "'maskless' has no mask function"
        block = prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER)
        with block, pytest.raises(NotImplementedError, match=message):
            prompts.model(**uneven)
        prompts.model.set_attn_implementation("sdpa")
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out)


def halved(attention: Any) -> None:
    """The attention of one rank of two, as `tp_plan` shards it: half of the heads, the other rank's part missing."""
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        weight = getattr(attention, name).weight
        weight.data = weight.data.chunk(2, dim)[0].clone()


@over_methods
def test_a_rank_of_a_tensor_parallel_model_is_refused_where_attention_chooses(method: str) -> None:
    """Each rank would see the attention of its own heads, and keep other tokens than the next."""
    prompts = llava(2)
    for layer in prompts.model.model.language_model.layers:
        halved(layer.self_attn)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        if method in IN_MODEL:
            with pytest.raises(NotImplementedError, match="2 of 4 heads, so this model is tensor-parallel"):
                logits_of(prompts)
        else:  # chosen before the layers, alike on every rank
            logits_of(prompts)
            assert pruning.stats["after"] == [9, 9]


# --- training and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITHOUT_MERGING])
def test_gradients_flow_to_the_vision_tower(method: str) -> None:
    """But for merged rows, which have none (`Selection`)."""
    prompts = llava(2, ragged=True)
    prompts.model.train()
    with prune_visual_tokens(prompts.model, method, 9, positions="original", **options_of(method)) as pruning:
        prompts.model(**prompts.inputs).logits[:, -1].square().sum().backward()
    exact = oracle.in_float64(prompts)
    exact.model.zero_grad()
    drops = drops_of(prompts, pruning, LAYER)
    with oracle._masking(exact.model.model.language_model, drops, prompts.inputs["input_ids"].shape[1]):
        exact.model(**exact.inputs).logits[:, -1].square().sum().backward()
    compared = 0
    # A key's bias shifts all logits of a row: its gradient is zero but for roundings of those around it.
    largest = max(float(p.grad.abs().max()) for p in exact.model.parameters() if p.grad is not None)
    for (name, got), want in zip(prompts.model.named_parameters(), exact.model.parameters(), strict=True):
        if want.grad is None or got.grad is None:
            assert want.grad is got.grad, name
            continue
        scale = float(want.grad.abs().max())
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0, atol=1e-5 * scale + 1e-8 * largest, msg=name)
        compared += "vision_tower" in name and scale > 0
    assert compared > 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_half_precision_errs_at_most_twice_what_masking_errs(method: str, precision: str) -> None:
    prompts = llava(2, ragged=True)
    if precision != "autocast":
        dtype = getattr(torch, precision)
        prompts.model.to(dtype)
        prompts.inputs["pixel_values"] = prompts.inputs["pixel_values"].to(dtype)
    mode = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    options = {"positions": "original", "seed": 1, **options_of(method)}
    kept = []
    for _ in range(2):
        with mode, prune_visual_tokens(prompts.model, method, 9, **options) as pruning:
            got = logits_of(prompts)[:, -1]
        kept.append(pruning.kept)
    assert torch.equal(*kept)
    drops = drops_of(prompts, pruning, LAYER)
    exact = oracle.logits(prompts, drops)[:, -1]
    with mode, oracle._masking(prompts.model.model.language_model, drops, prompts.inputs["input_ids"].shape[1]):
        masked = logits_of(prompts)[:, -1]
    error, allowed = (float((t.double() - exact).abs().max()) for t in (got, masked))
    assert 0 < error <= 2 * allowed
