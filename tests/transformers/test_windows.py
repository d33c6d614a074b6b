"""Decoders with windows, prompts whose tokens see each other, rotations by kind of layer, and the caches of these.

With every method they are proven in test_proofs.py.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.vlm import models_timm, models_window, oracle
from tests.transformers.vlm.checks import LAYER, drops_of
from tests.transformers.vlm.layouts import assert_salient, seen_by_methods
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.models_window import SIZES, WINDOW
from tests.transformers.vlm.runs_crops import banned, generate, pruned, vision_weights
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.transformers.kinds import kind_of
from tokenprune_kernels.integrations.transformers.masks import at_columns, sees_by

FAMILIES = {**models_window.FAMILIES, "gemma3n": models_timm.gemma3n_shared}
over_families = pytest.mark.parametrize("family", FAMILIES)
WINDOWED = [name for name in FAMILIES if name != "paligemma"]


@functools.cache
def prompts_of(family: str) -> Prompts:
    """Two samples, one padded on the left, with one image and two. Shared: leaving a block restores the model."""
    try:
        prompts = FAMILIES[family]()
    except ImportError as lacking:
        pytest.skip(f"transformers {transformers.__version__}: {lacking}")
    return prompts


@functools.cache
def limit(family: str) -> float:
    """Four times the rounding of the unpruned model's logits, of the prompt and of 32 new tokens: fewer tokens round
    otherwise."""
    prompts = prompts_of(family)
    new, decoded = generate(prompts, 32)
    exact = oracle.logits(prompts, [], new[:, :-1])
    real = prompts.inputs["attention_mask"].bool()
    with torch.no_grad():
        given = prompts.model(**prompts.inputs).logits
    errors = [(decoded - exact[:, -32:]).abs().max(), (given - exact[:, : real.shape[1]])[real].abs().max()]
    return 4 * float(max(errors))


def decoder_of(prompts: Prompts) -> Any:
    return prompts.model.get_decoder()


def assert_like_the_oracle(family: str, drops: list[oracle.Drop], new: Tensor, logits: Tensor, **more: Any) -> None:
    expected = oracle.logits(prompts_of(family), drops, new[:, :-1], **more)[:, -new.shape[1] :]
    assert float((logits - expected).abs().max()) < limit(family) < 5e-5  # of logits up to 1 or so
    expected[..., banned(prompts_of(family))] = -torch.inf
    assert torch.equal(new, expected.argmax(-1))


# --- results ----------------------------------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize("method", ["coast", "sts"])
def test_compacted_caches(family: str, method: str) -> None:
    """Layers in front of the pruning layer forget too: their windows cut at positions then."""
    prompts = prompts_of(family)
    with pruned(prompts, method, 0.3, compact_cache=True) as pruning:
        new, logits = generate(prompts, 16)
    assert_like_the_oracle(family, drops_of(prompts, pruning, LAYER, compact=True), new, logits)


@over_families
def test_a_schedule_that_begins_behind_a_layer_of_the_other_kind(family: str) -> None:
    prompts = prompts_of(family)
    with prune_visual_tokens(prompts.model, "fastv", {1: 0.6, 2: 0.3}, positions="renumber") as pruning:
        new, logits = generate(prompts, 16)
    assert list(pruning.kept_at) == [1, 2]
    assert_like_the_oracle(family, drops_of(prompts, pruning, 1), new, logits, renumber=True)


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_cut_what_they_would_not_cut_if_they_counted_tokens(family: str) -> None:
    """Of what is kept, some is outside the last token's window in the prompt and inside one of as many tokens."""
    prompts = prompts_of(family)
    with pruned(prompts, "divprune", 5) as pruning:
        generate(prompts, 1)
    (drop,) = drops_of(prompts, pruning, 0)
    left = ~drop.columns[0] & prompts.inputs["attention_mask"][0].bool()
    kept = left & (prompts.inputs["input_ids"][0] == prompts.visual)
    near = torch.zeros_like(kept)
    near[left.nonzero()[-WINDOW:]] = True
    outside = torch.arange(len(kept)) <= len(kept) - 1 - WINDOW
    assert (kept & near & outside).any()


def test_masks_of_eager_attention() -> None:
    prompts = models_window.gemma3()
    with pruned(prompts, "coast", 0.4) as pruning:
        new, logits = generate(prompts, 2)
        kept = pruning.kept
        prompts.model.set_attn_implementation("eager")
        again, same = generate(prompts, 2)
    assert torch.equal(pruning.kept, kept)
    assert torch.equal(new, again)
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-5)


def test_masks_are_read_as_tensors_and_as_block_masks() -> None:
    """Compiling flex attention with a window takes minutes on a CPU; what is read of its mask is a function."""
    columns = torch.tensor([[0, 3, 4, 9], [-1, 2, 5, 8]])
    within = sliding_window_causal_mask_function(4)
    index = torch.arange(10)
    allowed = within(0, 0, index[:, None], index)
    blocks = SimpleNamespace(mask_mod=within)
    sample, row = torch.arange(2)[:, None, None, None], torch.arange(4)
    for mask in (allowed[None, None], torch.where(allowed, 0.0, -1e30)[None, None], blocks):
        sees = sees_by(mask, 2)
        assert sees is not None
        found = at_columns(sees, columns)(sample, 0, row[None, None, :, None], row[None, None, None, :])
        assert found.shape == (2, 1, 4, 4)
        for b, q, k in itertools.product(range(2), range(4), range(4)):
            if columns[b, q] >= 0 and columns[b, k] >= 0:
                assert found[b, 0, q, k] == (0 <= columns[b, q] - columns[b, k] < 4)
    assert sees_by(None, 2) is None
    assert sees_by(torch.ones(2, 10), 2) is None


# --- caches -----------------------------------------------------------------------------------------------------------


def kinds_in(cache: DynamicCache) -> list[type]:
    return [type(layer) for layer in cache.layers]


def test_sliding_caches_hold_a_window_in_layers_that_were_not_pruned() -> None:
    prompts = prompts_of("gemma3")
    config = prompts.model.config.text_config
    token = torch.tensor([[7], [8]])
    mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 1), value=1)
    sliding, full = DynamicSlidingWindowLayer, DynamicLayer
    with torch.no_grad(), pruned(prompts, "coast", 0.4) as pruning:
        results = []
        for cache in (DynamicCache(config=config), DynamicCache()):
            first = prompts.model(**prompts.inputs, use_cache=True, past_key_values=cache).logits[:, -1]
            second = prompts.model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
            results.append(torch.stack([first, second], 1))
            assert cache.get_seq_length() == mask.shape[1]
            if cache.layers[0].is_sliding:
                assert kinds_in(cache) == [sliding, full, full, full]
                assert cache.layers[0].keys.shape[2] == WINDOW - 1
                cache.reset()
                assert kinds_in(cache) == [sliding, full] * 2
    expected = oracle.logits(prompts, drops_of(prompts, pruning, LAYER), token)[:, -2:]
    for result in results:
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=limit("gemma3"))


def test_an_unpruned_prompt_leaves_the_sliding_caches_as_they_were() -> None:
    prompts = prompts_of("gemma3")
    config = prompts.model.config.text_config
    plainly, inside = DynamicCache(config=config), DynamicCache(config=config)
    with torch.no_grad():
        prompts.model(**prompts.inputs, past_key_values=plainly)
        with pruned(prompts, "coast", 1.0, compact_cache=True):
            prompts.model(**prompts.inputs, past_key_values=inside)
    assert kinds_in(inside) == kinds_in(plainly)
    for one, other in zip(inside.layers, plainly.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert one.get_seq_length() == other.get_seq_length() == prompts.inputs["input_ids"].shape[1]


def test_a_second_turn_of_text_sees_its_window_of_the_conversation() -> None:
    prompts = prompts_of("gemma3")
    turn = torch.tensor([[7, 9, 11, 13], [8, 10, 12, 14]])
    mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 4), value=1)
    with torch.no_grad(), pruned(prompts, "coast", 0.4, compact_cache=True) as pruning:
        cache = prompts.model(**prompts.inputs, use_cache=True).past_key_values
        logits = prompts.model(input_ids=turn, attention_mask=mask, past_key_values=cache).logits
    expected = oracle.logits(prompts, drops_of(prompts, pruning, LAYER, compact=True), turn)[:, -4:]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=limit("gemma3"))


# --- what methods are given -------------------------------------------------------------------------------------------


@over_families
def test_methods_are_told_whether_a_prompt_sees_all_of_itself(family: str) -> None:
    prompts = prompts_of(family)
    given: list[bool] = []

    def first(features: Tensor, causal: bool, k: int) -> Tensor:
        given.append(causal)
        return torch.arange(k).expand(len(features), -1)

    with torch.no_grad(), prune_visual_tokens(prompts.model, first, 5):
        prompts.model(**prompts.inputs)
        if family == "paligemma":  # whose attention sees all where it is given no mask
            with pytest.raises(NotImplementedError, match="PaliGemma needs token_type_ids"):
                prompts.model(**{n: t for n, t in prompts.inputs.items() if n != "token_type_ids"})
    assert given == [not family.startswith("paligemma")]


def test_saliency_and_layout_of_mistral3() -> None:
    prompts = prompts_of("mistral3")
    salient, layout = seen_by_methods(prompts)
    grids = [[(size[0] // 4, size[1] // 4) for size in sample] for sample in SIZES]
    (weights,) = vision_weights(prompts, "attention", -1)
    start = 0
    for b, sample in enumerate(grids):
        expected = []
        for height, width in sample:
            here = slice(start, start + height * width)
            start = here.stop
            patches = weights[0, :, here, here].mean((0, 1)).view(height, width)
            expected += [
                float(patches[r : r + 2, c : c + 2].mean())
                for r in range(0, height - 1, 2)
                for c in range(0, width - 1, 2)
            ]
        assert_salient(salient[b], torch.tensor(expected))
    assert layout.grids[0, 0].tolist() == [4, 5]
    assert layout.positions[0, 19].tolist() == [3, 4]
    torch.testing.assert_close(layout.boxes[0, 19], torch.tensor([8 / 11, 6 / 9, 10 / 11, 8 / 9]))
    assert layout.images[1].tolist() == [0] * 8 + [1] * 9 + [0] * 3
    assert layout.grids[1, 8].tolist() == [3, 3]


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "llama4", "aya_vision"])
def test_saliency_and_layout_of_squares(family: str) -> None:
    prompts = prompts_of(family)
    salient, layout = seen_by_methods(prompts)
    (weights,) = tower_weights(prompts)
    side = 5 if family == "paligemma" else 10
    if family == "llama4":  # the row of the class token, which is the last
        weights = weights[:, :, -1:, :-1]
    images = weights.mean((1, 2)).view(-1, side, side)
    if side == 10:
        images = torch.stack([images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    assert_salient(salient[0], images[0].flatten())
    assert_salient(salient[1], images[1:].flatten())
    assert layout.grids.unique().tolist() == [1.0, 5.0]  # 1 in the padding
    assert layout.images[1].tolist() == [0] * 25 + [1] * 25
    torch.testing.assert_close(layout.boxes[1, 26], torch.tensor([0.2, 0.0, 0.4, 0.2]))


@pytest.mark.parametrize("family", ["gemma4"])
def test_saliency_and_layout_of_gemma4(family: str) -> None:
    prompts = prompts_of(family)
    salient, layout = seen_by_methods(prompts)
    (weights,) = tower_weights(prompts)
    grids = [(8, 10), (4, 6), (6, 8)]
    each = []
    for image, (height, width) in zip(weights, grids, strict=True):
        n = height * width
        patches = image[:, :n, :n].mean((0, 1)).view(height, width)
        each.append(torch.stack([patches[i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0).flatten())
    assert_salient(salient[0], each[0])
    assert_salient(salient[1], torch.cat(each[1:]))
    assert layout.images[1, :18].tolist() == [0] * 6 + [1] * 12
    assert layout.grids[1, [0, 6]].tolist() == [[2, 3], [3, 4]]
    torch.testing.assert_close(layout.boxes[1, 10], torch.tensor([0.0, 1 / 3, 0.25, 2 / 3]))


def tower_weights(prompts: Prompts) -> list[Tensor]:
    """[images, heads, queries, keys] of the last layer of the tower in float64, by its eager attention."""
    exact = oracle.in_float64(prompts)
    exact.model.set_attn_implementation("eager")
    core = getattr(exact.model, "model", exact.model)
    tower = core.vision_model.model if hasattr(core, "vision_model") else core.vision_tower
    body = getattr(tower, "vision_model", tower)
    layers = getattr(body, "encoder", body).layers
    seen: list[Tensor] = []
    layers[-1].self_attn.register_forward_hook(lambda m, a, output: seen.append(output[1]))
    with torch.no_grad():
        exact.model(**exact.inputs)
    return seen


def test_lse_of_a_window_is_not_given_to_methods_that_see_all_keys() -> None:
    def with_lse(module: Any, query: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **more)
        return out, query.new_zeros(query.shape[:3])

    ALL_ATTENTION_FUNCTIONS.register("with_lse", with_lse)
    ALL_MASK_ATTENTION_FUNCTIONS.register("with_lse", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    prompts = models_window.gemma3()
    decoder_of(prompts).config._attn_implementation = "with_lse"
    given: list[Any] = []

    def spied(key: Tensor, lse: Tensor | None, k: int) -> Tensor:
        given.append(lse)
        return torch.arange(k).expand(len(key), -1)

    config = decoder_of(prompts).config
    with torch.no_grad():
        for layer in (1, 2):
            with prune_visual_tokens(prompts.model, spied, 5, layer=layer):
                prompts.model(**prompts.inputs)
    assert [kind_of(config, layer - 1) for layer in (1, 2)] == ["sliding_attention", "full_attention"]
    assert given[0] is None
    assert given[1] is not None


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_attention_that_counts_windows_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = models_window.mistral3()
    for name in ("flash_attention_2", "some_kernel"):
        monkeypatch.setattr(decoder_of(prompts).config, "_attn_implementation_internal", name)
        with pytest.raises(NotImplementedError, match=f"sliding_attention need an .*got '{name}'"):
            prune_visual_tokens(prompts.model, "divprune", 5).__enter__()


def test_a_mistral3_without_a_window_is_of_one_kind() -> None:
    prompts = models_window.mistral3(window=None)
    assert kind_of(decoder_of(prompts).config, 3) == "full_attention"
    with pruned(prompts, "coast", 5) as pruning:
        new, logits = generate(prompts, 3)
    expected = oracle.logits(prompts, drops_of(prompts, pruning, LAYER), new[:, :-1])[:, -3:]
    assert (logits - expected).abs().max() < 2e-6


@pytest.mark.parametrize("layer", [3, 5])
def test_tokens_are_not_dropped_behind_a_layer_whose_keys_are_reused(layer: int) -> None:
    model = prompts_of("gemma4_shared").model
    with pytest.raises(NotImplementedError, match=f"layers from 4 on reuse .* those of layer 2; .* got layer {layer}"):
        prune_visual_tokens(model, "coast", 5, layer=layer)


def test_a_prompt_that_llama4_counts_is_refused() -> None:
    prompts = models_window.llama4((5,))
    with torch.no_grad(), prune_visual_tokens(prompts.model, "divprune", 5):
        with pytest.raises(NotImplementedError, match=r"from 128 tokens on layers of Llama 4 .* got 152"):
            prompts.model(**prompts.inputs)
        shorter = models_window.llama4((4,)).inputs
        out = prompts.model(**shorter)
        more = torch.full((1, 20), 7)
        mask = torch.ones((1, shorter["input_ids"].shape[1] + 20), dtype=torch.int64)
        with pytest.raises(NotImplementedError, match="from 128 tokens on"):
            prompts.model(input_ids=more, attention_mask=mask, past_key_values=out.past_key_values)


def test_labels_reach_a_head_that_is_further_down() -> None:
    prompts = prompts_of("llama4")
    ids, real = prompts.inputs["input_ids"], prompts.inputs["attention_mask"].bool()
    labels = ids.masked_fill(~real | torch.isin(ids, torch.tensor(prompts.visual)), -100)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "divprune", 5) as pruning:
        loss = prompts.model(**prompts.inputs, labels=labels).loss
    (drop,) = drops_of(prompts, pruning, 0)
    following = labels[:, 1:].masked_fill((drop.columns | ~real)[:, :-1], -100)
    logits = oracle.logits(prompts, [drop])[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(loss.double(), want, rtol=0, atol=1e-6)


def test_a_decoder_that_embeds_is_refused() -> None:
    prompts = models_window.gemma3()
    decoder_of(prompts).config.use_bidirectional_attention = True
    with pytest.raises(NotImplementedError, match="use_bidirectional_attention for all tokens"):
        prune_visual_tokens(prompts.model, "divprune", 5).__enter__()
