"""Static caches: pruned layers use the first places, and masks hide the others; with compiled decoding too."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import (
    CLOSE,
    LAYER,
    RENUMBERED,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    over_four_and_compact,
)
from tests.transformers.vlm.models import Prompts, llava, text
from tests.transformers.vlm.runs_qwen import batch as qwen_batch
from tokenprune_kernels.integrations.transformers import cache as cache_module
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

pytestmark = pytest.mark.skipif(not cache_module._STATIC, reason="static layers of this transformers do not count")
STATIC = {"cache_implementation": "static", "disable_compile": True}
PLACES = 80


def static_cache(prompts: Prompts, places: int = PLACES) -> Any:
    from transformers.cache_utils import StaticCache

    return StaticCache(config=prompts.model.config.text_config, max_cache_len=places)


def lengths(cache: Any) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


@over_four_and_compact
def test_generation_on_a_static_cache_equals_the_float64_path(method: str, compact: bool) -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning:
        out = generate(prompts.model, prompts.inputs, 32, **STATIC)
    drops = drops_of(prompts, pruning, LAYER, compact)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
def test_prefill_and_steps_use_the_first_places(attention: str, compact: bool) -> None:
    """No mask and no positions: how much is in a layer, its cache alone says. The second step has two tokens."""
    prompts = llava(2, attention=attention)
    length = prompts.inputs["input_ids"].shape[1]
    new = torch.tensor([[7, 8, 9], [11, 12, 13]])
    cache = static_cache(prompts)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER, compact_cache=compact) as pruning:
        out = prompts.model(prompts.inputs["input_ids"], prompts.inputs["pixel_values"], past_key_values=cache)
        first, last = length - 27 if compact else length, length - 27
        assert lengths(cache) == [first, first, last, last]
        addresses = [layer.keys.data_ptr() for layer in cache.layers]
        for layer in cache.layers:
            assert layer.keys.shape[2] == PLACES
        steps = [out.logits[:, -1:]]
        for start, end in ((0, 1), (1, 3)):
            steps.append(prompts.model(input_ids=new[:, start:end], past_key_values=cache).logits)
        assert cache.get_seq_length() == length + 3
        assert addresses == [layer.keys.data_ptr() for layer in cache.layers]
    want = oracle.logits(prompts, drops_of(prompts, pruning, LAYER, compact), new)[:, length - 1 :]
    torch.testing.assert_close(torch.cat(steps, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("method", ["coast", "divprune"])
def test_qwen_on_a_static_cache_equals_the_dynamic_one(method: str) -> None:
    prompts = qwen_batch("qwen3_vl")
    with prune_visual_tokens(prompts.model, method, 0.4, **options_of(method)):
        want = generate(prompts.model, prompts.inputs, 8, suppress_tokens=list(prompts.visual))
        got = generate(prompts.model, prompts.inputs, 8, suppress_tokens=list(prompts.visual), **STATIC)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=0, atol=1e-5)


def test_calibrated_keys_on_a_static_cache_equal_the_dynamic_one() -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, "visionzip", 9, calibrate=True):
        want = generate(prompts.model, prompts.inputs, 4)
        got = generate(prompts.model, prompts.inputs, 4, **STATIC)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), **CLOSE)


def test_beams_reorder_a_static_cache() -> None:
    prompts = llava(2, ragged=True)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        want = generate(prompts.model, prompts.inputs, 5, num_beams=3)
        got = generate(prompts.model, prompts.inputs, 5, num_beams=3, **STATIC)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
def test_a_later_turn_a_crop_a_copy_and_a_reset(compact: bool) -> None:
    prompts = llava()
    length = prompts.inputs["input_ids"].shape[1]
    question = torch.tensor([text(6, torch.Generator().manual_seed(1))])
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER, compact_cache=compact) as pruning:
        cache = static_cache(prompts)
        first = generate(prompts.model, prompts.inputs, 4, past_key_values=cache)
        kept = pruning.kept
        assert cache.get_seq_length() == length + 3
        copied = copy.deepcopy(cache)
        ids = torch.cat([first.sequences, question], 1)
        out = generate(prompts.model, {"input_ids": ids}, 3, past_key_values=cache)
        assert pruning.kept is kept
        again = prompts.model(input_ids=ids[:, length + 3 :], past_key_values=copied).logits[:, -1]
        torch.testing.assert_close(again, out.logits[0], **CLOSE)
        if hasattr(copied.layers[0], "crop"):
            copied.crop(-7)
            repeated = prompts.model(input_ids=ids[:, length + 3 :], past_key_values=copied).logits[:, -1]
            assert torch.equal(repeated, again)
        cache.reset()
        anew = generate(prompts.model, prompts.inputs, 4, past_key_values=cache)
        assert torch.equal(anew.sequences, first.sequences)
    drops = drops_of(prompts, pruning, LAYER, compact)
    want = oracle.logits(prompts, drops, out.sequences[:, length:-1])[:, -3:]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)


def test_what_a_static_cache_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompts = llava()

    def forward(cache: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = prompts.model(**prompts.inputs, past_key_values=cache).logits
        return logits

    offloaded = static_cache(prompts)
    offloaded.offloading = True
    with (
        prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER),
        pytest.raises(NotImplementedError, match="static cache must not be offloaded"),
    ):
        forward(offloaded)
    config = prompts.model.config.text_config
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "other", sdpa_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "other", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setattr(config, "_attn_implementation", "other")
    with (
        prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER),
        pytest.raises(NotImplementedError, match=r"got .other."),
    ):
        forward(static_cache(prompts))


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiling(**more: Any) -> dict[str, Any]:
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode="default", **more)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.usefixtures("_nothing_compiled")
def test_compiled_decoding_in_generate_equals_eager() -> None:
    """The compiled call stays with the model, and serves it outside of the block too."""
    prompts = llava(2, ragged=True)
    decoder = prompts.model.model.language_model
    decoder.layers = decoder.layers[:2]
    decoder.config.num_hidden_layers = 2

    def logits(**more: Any) -> Tensor:
        return torch.stack(generate(prompts.model, prompts.inputs, 3, **more).logits)

    plain = logits(**STATIC)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=1):
        want = logits(**STATIC)
        torch.testing.assert_close(logits(**compiling()), want, **CLOSE)
        with pytest.raises(NotImplementedError, match="fullgraph=True allows no hooks"):
            logits(**compiling(fullgraph=True))
    assert not torch.allclose(plain, want, atol=1e-5)
    torch.testing.assert_close(logits(**compiling()), plain, **CLOSE)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
