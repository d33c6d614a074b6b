"""Pruned LLaVA-1.5: nothing dropped changes no bit, something dropped equals the float64 path, with every method."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    IN_MODEL,
    LAYER,
    RENUMBERED,
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
BATCHES = {"one": (1, False), "padded": (3, True)}
over_batches = pytest.mark.parametrize("batch", BATCHES)
TOKENS = 36
SEED = {"random": {"seed": 5}}


def sample_alone(prompts: Prompts, b: int) -> dict[str, Tensor]:
    """One sample of a batch with as many images in each, without its padding."""
    ids, mask = prompts.inputs["input_ids"][b : b + 1], prompts.inputs["attention_mask"][b : b + 1]
    pixels = prompts.inputs["pixel_values"]
    each = len(pixels) // len(prompts.inputs["input_ids"])
    real = mask.bool()
    return {
        "input_ids": ids[real].unsqueeze(0),
        "attention_mask": mask[real].unsqueeze(0),
        "pixel_values": pixels[b * each : (b + 1) * each],
    }


# --- nothing dropped --------------------------------------------------------------------------------------------------


@over_methods
@over_batches
@pytest.mark.parametrize("keep", [1.0, TOKENS])
def test_keeping_all_tokens_changes_no_bit(method: str, batch: str, keep: float) -> None:
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    plain = generate(prompts.model, prompts.inputs, 2)
    with prune_visual_tokens(prompts.model, method, keep, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 2)
    assert torch.equal(out.sequences, plain.sequences)
    for got, want in zip(out.logits, plain.logits, strict=True):
        assert torch.equal(got, want)
    assert pruning.kept is not None
    assert torch.equal(pruning.kept, torch.arange(TOKENS).expand(len(pruning.kept), -1))
    assert pruning.stats["before"] == pruning.stats["after"] == [TOKENS] * len(pruning.kept)
    assert pruning.stats["layers"] == []


# --- something dropped ------------------------------------------------------------------------------------------------


# A padded batch whose caches are as they are is among the proofs of all families.
@pytest.mark.parametrize(
    ("batch", "method", "compact"),
    [("one", m, False) for m in METHODS] + [(b, m, True) for b in BATCHES for m in IN_MODEL],
)
def test_prefill_and_32_decoded_tokens_equal_the_float64_path(method: str, batch: str, compact: bool) -> None:
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    keep, count = (9, 9) if batch == "one" else (0.4, 14)
    with prune_visual_tokens(
        prompts.model, method, keep, compact_cache=compact, **options_of(method), **SEED.get(method, {})
    ) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    kept = pruning.kept
    assert kept is not None
    assert kept.shape == (BATCHES[batch][0], count)
    assert (kept.diff(dim=1) > 0).all()  # ascending: no token twice
    assert int(kept.min()) >= 0
    assert int(kept.max()) < TOKENS
    drops = drops_of(prompts, pruning, LAYER, compact)
    assert [d.layer for d in drops] == {"sts": [0, LAYER]}.get(method, [LAYER if method in IN_MODEL else 0])
    if method == "sts":
        assert pruning.kept_at[0].shape[1] == 2 * count
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@over_methods
def test_greedy_tokens_are_those_of_the_float64_path(method: str) -> None:
    """The path chooses its 32 tokens by itself, so that an error cannot be teacher-forced away."""
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(
        prompts.model, method, 7, positions="original", **options_of(method), **SEED.get(method, {})
    ) as pruning:
        out = generate(prompts.model, prompts.inputs, 32)
    want = oracle.greedy(prompts, drops_of(prompts, pruning, LAYER), 32)
    assert torch.equal(out.sequences[:, prompts.inputs["input_ids"].shape[1] :], want)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("method", IN_MODEL)
def test_every_layer_can_be_the_pruning_layer(method: str, layer: int) -> None:
    prompts = llava(2, ragged=True)
    options = {**options_of(method), "layer": layer, "compact_cache": layer == 3}
    with prune_visual_tokens(prompts.model, method, 5, **options) as pruning:
        out = generate(prompts.model, prompts.inputs, 3)
    assert pruning.stats["layers"] == ([0, layer] if method == "sts" else [layer])
    drops = drops_of(prompts, pruning, layer, layer == 3)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@pytest.mark.parametrize("method", ["adafv", "divprune", "zspaprune", "random"])
def test_positions_are_original_or_renumbered_as_asked(method: str) -> None:
    prompts = llava(2, ragged=True)
    for positions in ("original", "renumber"):
        with prune_visual_tokens(prompts.model, method, 6, positions=positions) as pruning:
            out = generate(prompts.model, prompts.inputs, 4)
        drops = drops_of(prompts, pruning, 0)
        assert_decoded_like_the_oracle(prompts, drops, out, renumber=positions == "renumber")


# --- the kept tokens are the method's ---------------------------------------------------------------------------------


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return t * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def shown_by_an_unpruned_run(prompts: Prompts, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Embeddings, hidden states, query and key of one sample, from the weights and the inputs of the layers."""
    model = prompts.model
    model.set_attn_implementation("eager")
    layers, seen = model.model.language_model.layers, {}
    attention = layers[LAYER - 1].self_attn

    def at(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])

        return hook

    handles = [
        module.register_forward_pre_hook(at(name), with_kwargs=True)
        for name, module in (("embeds", layers[0]), ("attention", attention), ("hidden", layers[LAYER]))
    ]
    with torch.no_grad():
        model(**inputs)
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    for handle in handles:
        handle.remove()
    hidden, (cos, sin) = seen["attention"]
    split = (*hidden.shape[:2], -1, attention.head_dim)
    ids = inputs["input_ids"][0]
    column = torch.arange(len(ids))
    visual = column[ids == prompts.visual]
    text = column[column > visual.max()]
    return {
        "query": rotated(attention.q_proj(hidden).view(split).transpose(1, 2), cos, sin)[:, :, text],
        "key": rotated(attention.k_proj(hidden).view(split).transpose(1, 2), cos, sin),
        "visual": visual.unsqueeze(0),
        "text_positions": text.unsqueeze(0),
        "embeds": seen["embeds"][0][:, visual],
        "text": seen["embeds"][0][:, text],
        "hidden": seen["hidden"][0][:, visual],
        "text_hidden": seen["hidden"][0][:, text],
        "keys_before_rope": layers[LAYER].self_attn.k_proj(seen["hidden"][0][:, visual]),
        # the class token's row of the layer whose output is hidden_states[vision_feature_layer]
        "saliency": tower.attentions[model.config.vision_feature_layer][:, :, 0, 1:].mean(1).reshape(1, -1),
        "positions": torch.cartesian_prod(torch.arange(6), torch.arange(6)).float().unsqueeze(0),
    }


@pytest.mark.parametrize("method", ["coast", "adafv", "zspaprune", "adaptprune", "fastv", "divprune", "random"])
@over_batches
def test_kept_tokens_are_the_methods_on_an_unpruned_eager_run(method: str, batch: str) -> None:
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    with prune_visual_tokens(prompts.model, method, 11, **options_of(method), **SEED.get(method, {})) as pruning:
        generate(prompts.model, prompts.inputs, 1)
    generator = torch.Generator().manual_seed(5)
    for b in range(BATCHES[batch][0]):
        s = shown_by_an_unpruned_run(prompts, sample_alone(prompts, b))
        attention = {"key_indices": s["visual"], "query_positions": s["text_positions"]}
        scored = (s["query"], s["key"])
        want = {
            "coast": lambda s=s, a=attention, q=scored: methods.coast(*q, s["hidden"], 11, **a),
            "fastv": lambda a=attention, q=scored: methods.fastv(*q, 11, **a),
            "adaptprune": lambda s=s, a=attention, q=scored: methods.adaptprune(
                *q, s["keys_before_rope"], s["positions"], 11, grid=(6, 6), **a
            ),
            "adafv": lambda s=s: methods.adafv(s["text"], s["embeds"], s["saliency"], 11),
            "zspaprune": lambda s=s: methods.zspaprune(s["text"], s["embeds"], 11),
            "divprune": lambda s=s: methods.divprune(s["embeds"], 11),
        }
        assert pruning.kept is not None
        if method == "random":
            want["random"] = lambda: methods.random(TOKENS, 11, generator)
        assert torch.equal(pruning.kept[b], want[method]().indices[0])


def test_sts_chooses_twice_as_its_two_functions_do() -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, "sts", 8, layer=LAYER) as pruning:
        generate(prompts.model, prompts.inputs, 1)
    first, second = pruning.kept_at[0], pruning.kept_at[LAYER]
    assert pruning.kept is second
    for b in range(2):
        s = shown_by_an_unpruned_run(prompts, sample_alone(prompts, b))
        coordinates = torch.cat([s["positions"], torch.zeros(1, TOKENS, 1)], -1)
        assert torch.equal(first[b], methods.sts_structure(s["embeds"], 16, positions=coordinates).indices[0])
    # The second stage sees a model that has only the first one's tokens.
    captured: dict[str, Any] = {}

    def spied(**given: Any) -> Any:
        captured.update(given, result=methods.sts_semantics(**given))
        return captured["result"]

    with pytest.MonkeyPatch.context() as patch:
        spy_on(patch, "sts", "sts_semantics", spied)
        with prune_visual_tokens(prompts.model, "sts", 8, layer=LAYER):
            generate(prompts.model, prompts.inputs, 1)
    assert captured["key_indices"].shape == (2, 16)
    assert torch.equal(first.gather(1, captured["result"].indices), second)


@over_methods
def test_a_padded_batch_keeps_what_each_sample_alone_keeps(method: str) -> None:
    if method == "random":
        pytest.skip("draws for the whole batch")
    prompts = llava(3, ragged=True, images=2)
    if method == "dart":  # the L1 norm of a rotated key depends on its position, which padding must not shift then
        counted = prompts.inputs["attention_mask"].cumsum(1) - 1
        prompts.inputs["position_ids"] = counted.clamp_min(0)
    with prune_visual_tokens(prompts.model, method, 0.2, **options_of(method)) as pruning:
        together = prompts.model(**prompts.inputs).logits[:, -1]
        kept = pruning.kept
        assert kept is not None
        for b in range(3):
            alone = prompts.model(**sample_alone(prompts, b)).logits[:, -1]
            assert torch.equal(kept[b : b + 1], pruning.kept)
            torch.testing.assert_close(together[b : b + 1], alone, **CLOSE)


# --- budgets and positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "count"), [(1, 1), (1000, 36), (0.001, 1), (0.25, 9), (0.222, 8), (0.5, 18)])
def test_keep_is_a_count_or_a_ratio_of_each_samples_tokens(keep: float, count: int) -> None:
    prompts = llava(2)
    with prune_visual_tokens(prompts.model, "divprune", keep) as pruning:
        prompts.model(**prompts.inputs)
    assert pruning.stats["after"] == [count, count]


@pytest.mark.parametrize("method", IN_MODEL)
def test_the_default_layer_is_the_papers(method: str) -> None:
    prompts = llava()
    with prune_visual_tokens(prompts.model, method, 8) as pruning:
        prompts.model(**prompts.inputs)
    assert pruning.stats["layers"][-1] == (3 if method == "pyramiddrop" else 2)  # 24 of 32, as 3 of 4


@over_methods
def test_the_model_without_its_head_is_pruned_too(method: str) -> None:
    prompts = llava(2, ragged=True)
    options = {**options_of(method), **SEED.get(method, {})}
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 8, **options):
        logits = prompts.model(**prompts.inputs).logits
    with torch.no_grad(), prune_visual_tokens(prompts.model.model, method, 8, **options):
        hidden = prompts.model.model(**prompts.inputs).last_hidden_state
    assert torch.equal(prompts.model.lm_head(hidden), logits)
