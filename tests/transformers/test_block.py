"""The block itself: what it leaves behind, what it refuses, and its reports."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.vlm.checks import LAYER, assert_decoded_like_the_oracle, drops_of, generate, options_of
from tests.transformers.vlm.models import TEXT, Prompts, llava
from tokenprune_kernels.integrations.transformers import METHODS, prefill, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.report import Clock

over_methods = pytest.mark.parametrize("method", METHODS)


def state_of(model: nn.Module) -> list[Any]:
    """All that a block could leave behind."""
    hooks = [
        {key: dict(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        for module in model.modules()
    ]
    config = model.config
    names = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]
    attributes = [sorted(vars(module)) for module in model.modules()]
    registries = [dict(r._global_mapping) for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return [hooks, names, attributes, registries]


def logits_of(prompts: Prompts, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prompts.model(**{**prompts.inputs, **more}).logits
    return logits


# --- entering and leaving ---------------------------------------------------------------------------------------------


@over_methods
def test_leaving_the_block_restores_the_model_exactly(method: str) -> None:
    prompts = llava(2, ragged=True)
    plain = logits_of(prompts)  # in some versions, the first forward installs hooks of transformers
    before = state_of(prompts.model)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        assert state_of(prompts.model) != before
        assert logits_of(prompts).shape != plain.shape
    assert state_of(prompts.model) == before
    assert torch.equal(logits_of(prompts), plain)


class BrokenError(Exception):
    pass


def failing(*_: Any, **__: Any) -> None:
    raise BrokenError


@pytest.mark.parametrize("method", ["coast", "adafv"])
@pytest.mark.parametrize("where", ["block", "tower", "layer", "attention", "norm", "selection"])
def test_after_an_exception_the_model_is_as_before(method: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava(2, ragged=True)
    core = prompts.model.model
    decoder = core.language_model
    modules = {
        "tower": core.vision_tower, "layer": decoder.layers[LAYER], "attention": decoder.layers[LAYER].self_attn,
        "norm": decoder.norm,
    }  # fmt: skip
    plain = logits_of(prompts)  # in some versions, the first forward installs hooks of transformers
    before = state_of(prompts.model)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        want = logits_of(prompts)
    block = prune_visual_tokens(prompts.model, method, 9, **options_of(method))
    with pytest.raises(BrokenError), block:  # noqa: PT012
        if where == "block":
            raise BrokenError
        with monkeypatch.context() as patch:
            if where == "selection":
                patch.setattr(prefill, "choose", failing)
            handle = modules[where].register_forward_pre_hook(failing) if where in modules else None
            with pytest.raises(BrokenError):
                logits_of(prompts)
            if handle is not None:
                handle.remove()
        assert torch.equal(logits_of(prompts), want)  # the block goes on
        raise BrokenError
    assert state_of(prompts.model) == before
    assert torch.equal(logits_of(prompts), plain)


@pytest.mark.parametrize("inner", ["coast", "adafv", "divprune"])
def test_a_nested_block_is_an_error_and_leaves_the_outer_one_intact(inner: str) -> None:
    prompts = llava(2)
    logits_of(prompts)
    before = state_of(prompts.model)
    with prune_visual_tokens(prompts.model, "adafv", 9) as outer:
        want, inside = logits_of(prompts), state_of(prompts.model)
        with pytest.raises(RuntimeError, match="leave that block first"), prune_visual_tokens(prompts.model, inner, 5):
            pass
        with pytest.raises(RuntimeError, match="entered a second time"), outer:
            pass
        assert state_of(prompts.model) == inside
        assert torch.equal(logits_of(prompts), want)
    assert state_of(prompts.model) == before


def test_a_block_that_was_left_can_be_entered_again() -> None:
    prompts = llava(2)
    logits_of(prompts)
    before = state_of(prompts.model)
    block = prune_visual_tokens(prompts.model, "random", 9, seed=3)
    results = []
    for _ in range(2):
        with block:
            results.append((logits_of(prompts), block.kept))
    assert torch.equal(results[0][0], results[1][0])  # the seed counts from the entrance
    assert state_of(prompts.model) == before


def test_two_models_are_pruned_at_once() -> None:
    one, two = llava(1), llava(3, ragged=True)
    with prune_visual_tokens(two.model, "adafv", 5):
        want = logits_of(two)
    with (
        prune_visual_tokens(one.model, "coast", 9, layer=LAYER) as first,
        prune_visual_tokens(two.model, "adafv", 5) as second,
    ):
        logits_of(one)
        assert torch.equal(logits_of(two), want)
        out = generate(one.model, one.inputs, 4)
    assert first.stats["after"] == [9]
    assert second.stats["after"] == [5] * 3
    assert_decoded_like_the_oracle(one, drops_of(one, first, LAYER), out)
    # A config shared by two models would name one attention function for both.
    sharing = transformers.LlavaForConditionalGeneration(one.model.config)
    with prune_visual_tokens(one.model, "coast", 9), pytest.raises(RuntimeError, match="shares its config"):
        prune_visual_tokens(sharing, "coast", 9).__enter__()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "best"}, ValueError, "coast, sts, adafv"),
        ({"keep": 0}, ValueError, "at least 1"),
        ({"keep": -3}, ValueError, "at least 1"),
        ({"keep": 0.0}, ValueError, r"\(0, 1\]"),
        ({"keep": 1.5}, ValueError, r"\(0, 1\]"),
        ({"keep": float("nan")}, ValueError, r"\(0, 1\]"),
        ({"keep": "9"}, TypeError, "int .* or a float"),
        ({"keep": True}, TypeError, "int .* or a float"),
        ({"keep": np.int64(0)}, ValueError, "at least 1"),
        ({"keep": np.float32(1.5)}, ValueError, r"\(0, 1\]"),
        ({"keep": torch.tensor(True)}, TypeError, "int .* or a float"),
        ({"keep": np.bool_(True)}, TypeError, "int .* or a float"),
        ({"keep": torch.tensor([9])}, TypeError, "int .* or a float"),
        ({"keep": np.array([3, 4])}, TypeError, "int .* or a float"),
        ({"seed": 1.0}, TypeError, "seed must be an int or None, got 1.0"),
        ({"layer": 0}, ValueError, r"\[1, 3\]"),
        ({"layer": 4}, ValueError, r"\[1, 3\]"),
        ({"layer": 1.0}, ValueError, r"\[1, 3\]"),
        ({"method": "divprune", "layer": 2}, ValueError, "before the language model"),
        ({"positions": "new"}, ValueError, "original or renumber"),
        ({"anchor_ratoi": 0.5}, TypeError, "anchor_ratio, context_ratio"),
        ({"method": "random", "first": "outlier"}, TypeError, "its options are backend"),
        ({"method": "divprune", "mask": None}, TypeError, "its options are first"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_expected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune_visual_tokens(llava().model, **{"method": "coast", "keep": 9, **arguments})


SCALARS = [
    np.int64(12), np.uint8(12), np.array(12), torch.tensor(12), np.float16(0.25), np.float64(0.25), torch.tensor(0.25),
]  # fmt: skip


@pytest.mark.parametrize("keep", SCALARS, ids=lambda keep: f"{type(keep).__name__} {keep}")
def test_scalars_of_numpy_and_torch_are_as_good_as_pythons(keep: Any) -> None:
    prompts = llava()
    for method, arguments in (("random", {"seed": torch.tensor(5)}), ("coast", {"layer": np.int32(LAYER)})):
        plain = {name: value.item() for name, value in arguments.items()}
        with prune_visual_tokens(prompts.model, method, keep.item(), **plain) as expected:
            logits_of(prompts)
        with prune_visual_tokens(prompts.model, method, keep, **arguments) as pruning:
            logits_of(prompts)
        assert torch.equal(pruning.kept, expected.kept)
        assert pruning.kept.shape[1] == (12 if keep > 1 else 9)


def test_options_reach_the_method() -> None:
    prompts = llava()
    kept = []
    for more in ({}, {"anchor_ratio": 0.1, "context_ratio": (0.9, 0.9)}, {"backend": "reference"}):
        with prune_visual_tokens(prompts.model, "coast", 12, layer=LAYER, **more) as pruning:
            logits_of(prompts)
        kept.append(pruning.kept)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_an_unsupported_model_is_named_with_the_supported_ones() -> None:
    config = transformers.LlamaConfig(**TEXT)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM .*supported are .*llava"):
        prune_visual_tokens(transformers.LlamaForCausalLM(config))
    with pytest.raises(NotImplementedError, match="Linear"):
        prune_visual_tokens(nn.Linear(2, 2))


def test_decoder_layers_with_a_window_are_refused() -> None:
    prompts = llava()
    text_config = prompts.model.config.text_config
    for name, value in (("sliding_window", 8), ("layer_types", ["full_attention", "sliding_attention"] * 2)):
        before = state_of(prompts.model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_config, name, value, raising=False)
            with pytest.raises(NotImplementedError, match="sliding"):
                prune_visual_tokens(prompts.model, "divprune", 9).__enter__()
        assert state_of(prompts.model) == before


def test_sliding_and_quantised_caches_are_refused() -> None:
    from transformers.cache_utils import (
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        QuantizedCache,
        QuantoQuantizedLayer,
    )

    class OtherLayer(DynamicLayer):
        pass

    prompts = llava()
    config = prompts.model.config.text_config
    sliding, other = DynamicCache(config=config), DynamicCache(config=config)
    sliding.layers[1] = DynamicSlidingWindowLayer(sliding_window=8)
    other.layers[0] = OtherLayer()
    quantised = object.__new__(QuantizedCache)  # the packages that quantise are not installed
    quantised.layers = [object.__new__(QuantoQuantizedLayer) for _ in range(4)]
    caches = {"DynamicSlidingWindowLayer": sliding, "OtherLayer": other, "QuantizedCache": quantised}
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        for name, cache in caches.items():
            with pytest.raises(NotImplementedError, match=f"must be a DynamicCache of DynamicLayers.*, got {name}"):
                logits_of(prompts, past_key_values=cache)


def test_a_cache_in_eight_bits_is_refused_by_name() -> None:
    from transformers.cache_utils import QuantizedCache

    prompts = llava()
    try:
        cache = QuantizedCache("fp8", prompts.model.config.text_config)
    except ValueError:
        pytest.skip("this transformers has no cache of 8-bit floating point")
    with (
        prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER),
        pytest.raises(NotImplementedError, match="got QuantizedCache"),
    ):
        logits_of(prompts, past_key_values=cache)


def test_data_parallel_wrappers_and_replicas_are_refused() -> None:
    prompts = llava()
    with pytest.raises(NotImplementedError, match=r"DataParallel wraps the model .* a process per device"):
        prune_visual_tokens(nn.DataParallel(prompts.model))
    with prune_visual_tokens(prompts.model, "divprune", 9):
        for part in (prompts.model, prompts.model.model, prompts.model.model.language_model):
            replica = part._replicate_for_data_parallel()
            with pytest.raises(NotImplementedError, match=f"{type(part).__name__} is a replica"):
                replica(prompts.inputs["input_ids"])
        assert logits_of(prompts).shape[1] == prompts.inputs["input_ids"].shape[1] - 27


def test_inputs_that_cannot_be_pruned_are_refused() -> None:
    prompts = llava(2)
    ids = prompts.inputs["input_ids"]
    length = ids.shape[1]
    square = torch.ones(length, length).tril().bool().expand(2, 1, -1, -1)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
        with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\] or absent, got \[2, 1"):
            logits_of(prompts, attention_mask=square)
        with pytest.raises(NotImplementedError, match="got dict"):
            logits_of(prompts, attention_mask={"full_attention": square})
        assert pruning.kept is None


# --- reports ----------------------------------------------------------------------------------------------------------


def test_stats_and_kept_before_and_after_a_prefill() -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, "sts", 9, layer=LAYER, compact_cache=True) as pruning:
        assert pruning.kept is None
        assert pruning.kept_at == {}
        assert pruning.stats == {"method": "sts", "prefills": 0}
        with pytest.raises(RuntimeError, match="nothing was pruned yet"):
            pruning.overlay(None)
        with pytest.raises(RuntimeError, match="nothing was pruned yet"):
            pruning.boxes()
        generate(prompts.model, prompts.inputs, 3)
    stats = pruning.stats
    assert stats.pop("select_ms") > 0
    assert stats.pop("compact_ms") > 0
    assert stats == {
        "method": "sts", "prefills": 1, "before": [36, 36], "after": [9, 9], "layers": [0, LAYER], "backend": "cpu",
    }  # fmt: skip
    with prune_visual_tokens(prompts.model, "sts", 1.0, layer=LAYER) as pruning:
        logits_of(prompts)
    assert pruning.stats["backend"] is None


def test_times_are_those_of_the_gpu_that_works_not_of_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, waited_for = [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self, stream: Any = "of the current GPU") -> None:
            recorded.append(stream)

        def elapsed_time(self, later: Any) -> float:
            return 2.0

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited_for.append(device))
    clock = Clock(gpu)
    for _ in range(2):
        with clock:
            pass
    assert recorded == ["of cuda:1"] * 4
    assert waited_for == []
    assert clock.milliseconds() == 4.0
    assert waited_for == [gpu]


def test_overlay_darkens_what_no_kept_token_sees(tmp_path: Any) -> None:
    from PIL import Image

    prompts = llava(2, images=2)
    with prune_visual_tokens(prompts.model, "divprune", 20) as pruning:
        logits_of(prompts)
    photo = Image.new("RGB", (120, 60), (200, 100, 40))  # tokens see 20 x 10 pixels
    photo.save(tmp_path / "photo.png")
    assert pruning.kept is not None
    for sample in range(2):
        for image in range(2):
            shown = pruning.overlay(photo, sample=sample, image_index=image)
            kept = {k - 36 * image for k in pruning.kept[sample].tolist()}
            coordinates = [divmod(k, 6) for k in sorted(kept) if 0 <= k < 36]
            seen = torch.tensor([(c, r, c + 1, r + 1) for r, c in coordinates]) / 6
            torch.testing.assert_close(pruning.boxes(sample=sample, image_index=image), seen)
            for token in range(36):
                row, column = divmod(token, 6)
                pixels = {shown.getpixel((20 * column + x, 10 * row + y)) for x in (0, 19) for y in (0, 9)}
                assert pixels == {(200, 100, 40) if token in kept else (50, 25, 10)}
    from_file = pruning.overlay(tmp_path / "photo.png", sample=1, image_index=1)
    assert from_file.tobytes() == shown.tobytes()
    assert from_file.size == photo.size
    assert photo.getpixel((0, 0)) == (200, 100, 40)
