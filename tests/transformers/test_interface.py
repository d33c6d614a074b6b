"""What of transformers' interface differs between versions, and what happens where it is none that is known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from tests.transformers.vlm.checks import LAYER, options_of, over_four_and_compact
from tests.transformers.vlm.models import llava
from tokenprune_kernels.integrations.transformers import masks, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.interface import CACHE_NAMES, arguments_of


class Takes(nn.Module):
    """A forward with the names of a version, past or future."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[method-assign]


def newer(hidden: Any, cache: Any = None, **more: Any) -> None: ...
def older(hidden: Any, past_key_values: Any = None, **more: Any) -> None: ...
def unknown(hidden: Any, memory: Any = None, **more: Any) -> None: ...


def test_the_cache_is_found_under_both_of_its_names() -> None:
    new, old = arguments_of(Takes(newer), "cache"), arguments_of(Takes(older), "cache")
    first, second = object(), object()
    assert new.cache({"cache": first}) is first
    assert new.cache({"past_key_values": first}) is first  # still taken from callers
    assert new.cache({"cache": first, "past_key_values": second}) is first
    assert new.cache({"cache": None, "past_key_values": second}) is None
    assert new.cache({}) is None
    assert old.cache({"past_key_values": first}) is first
    assert old.cache({"cache": first}) is None  # goes into the forward's **kwargs, where nothing reads it
    assert old.bind((1, first), {"use_cache": True}) == {"hidden": 1, "past_key_values": first, "use_cache": True}
    assert old.split({"hidden": 1, "past_key_values": first, "use_cache": True}, 1) == (
        (1,), {"past_key_values": first, "use_cache": True},
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="Takes takes no cache or past_key_values, only hidden, memory, more"):
        arguments_of(Takes(unknown), "cache")
    with pytest.raises(RuntimeError, match="Takes was called without cache or past_key_values; it got hidden"):
        new.given({"hidden": 1}, "hidden", "cache")


@over_four_and_compact
def test_a_callers_cache_under_either_name_is_filled_and_decoded_on(method: str, compact: bool) -> None:
    prompts = llava(2, ragged=True)
    accepted = [name for name in CACHE_NAMES if CACHE_NAMES[0] in arguments_of(prompts.model).names or name != "cache"]
    assert accepted
    token = torch.tensor([[7], [8]])
    mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 1), value=1)
    with (
        torch.no_grad(),
        prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning,
    ):
        out = prompts.model(**prompts.inputs)
        want = prompts.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values).logits
        for name in accepted:
            cache = DynamicCache(config=prompts.model.config.text_config)
            first = prompts.model(**prompts.inputs, **{name: cache}).logits
            assert torch.equal(first, out.logits)
            assert torch.equal(prompts.model(input_ids=token, attention_mask=mask, **{name: cache}).logits, want)
        assert pruning.stats["prefills"] == 1 + len(accepted)


REFUSED = {
    "core": ("LlavaModel", "cache or past_key_values"),
    "decoder": ("LlamaModel", "inputs_embeds"),
    "layer": ("LlamaDecoderLayer", "position_embeddings"),
}


@pytest.mark.parametrize("where", REFUSED)
def test_a_forward_without_what_the_hooks_need_is_refused_on_entering(where: str) -> None:
    prompts = llava()
    core = prompts.model.model
    module = {"core": core, "decoder": core.language_model, "layer": core.language_model.layers[0]}[where]
    lacks = {
        "core": lambda input_ids=None, attention_mask=None, position_ids=None, memory=None: None,
        "decoder": lambda embeds=None, attention_mask=None, position_ids=None, cache=None: None,
        "layer": lambda hidden_states, attention_mask=None, rotary=None, cache=None: None,
    }
    module.forward = lacks[where]
    name, missing = REFUSED[where]
    with pytest.raises(NotImplementedError, match=f"{name} takes no {missing}"):
        prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER).__enter__()
    assert prompts.model.config.text_config._attn_implementation == "sdpa"


def test_layers_and_decoders_that_are_called_otherwise_are_errors_in_the_prefill() -> None:
    prompts = llava(2)
    core = prompts.model.model
    decoder, layer = core.language_model, core.language_model.layers[0]

    def without(*dropped: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {name: value for name, value in kwargs.items() if name not in dropped}

        return hook

    cases: list[tuple[nn.Module, Callable[..., Any], str]] = [
        (layer, without(*CACHE_NAMES), "LlamaDecoderLayer was called without cache or past_key_values"),
        (layer, without("position_embeddings"), "LlamaDecoderLayer was called without position_embeddings"),
        (decoder, without(*CACHE_NAMES), "LlamaModel was called without cache or past_key_values"),
        (decoder, without("inputs_embeds"), "LlamaModel was called without inputs_embeds"),
    ]
    for module, hook, message in cases:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
            with pytest.raises(RuntimeError, match=message):
                prompts.model(**prompts.inputs)
            assert pruning.kept is None
        handle.remove()
    # A model that has its decoder run by somebody else.
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        decoder._forward, core.language_model.forward = decoder.forward, decoder.forward
        core.forward = lambda input_ids=None, **given: decoder.forward(inputs_embeds=decoder.embed_tokens(input_ids))
        with pytest.raises(RuntimeError, match="LlavaModel did not call its LlamaModel"):
            core(input_ids=prompts.inputs["input_ids"])


def test_a_cache_that_the_decoder_makes_itself_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    class OtherCache(DynamicCache):
        pass

    prompts = llava()
    monkeypatch.setattr(modeling_llama, "DynamicCache", OtherCache)
    with (
        prune_visual_tokens(prompts.model, "divprune", 9),
        pytest.raises(NotImplementedError, match=r"must be a DynamicCache of DynamicLayers.*, got OtherCache"),
    ):
        prompts.model(**prompts.inputs, use_cache=True)


def test_masks_of_another_form_are_refused_while_decoding() -> None:
    prompts = llava(2)
    token = torch.tensor([[7], [8]])
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        cache = prompts.model(**prompts.inputs).past_key_values
        keys = cache.get_seq_length() + 1
        for mask in (torch.ones(2, 1, 1, keys, dtype=torch.bool), {"full_attention": None}, torch.ones(2, 0)):
            got = "dict" if isinstance(mask, dict) else str(list(mask.shape)).replace("[", r"\[").replace("]", r"\]")
            with pytest.raises(
                NotImplementedError, match=rf"must be absent or \[B, L\] with L at least 1, .*; got {got}"
            ):
                prompts.model(input_ids=token, attention_mask=mask, past_key_values=cache)
        want = prompts.model(input_ids=token, past_key_values=cache).logits
    assert want.shape[1] == 1


def test_a_decoder_that_embeds_by_itself_decodes_on_a_pruned_cache() -> None:
    prompts = llava(2)
    token, decoder = torch.tensor([[7, 9], [8, 5]]), prompts.model.model.language_model
    results = []
    with torch.no_grad(), prune_visual_tokens(prompts.model, "sts", 9, layer=LAYER, compact_cache=True):
        for given in ({"input_ids": token}, {"inputs_embeds": decoder.embed_tokens(token)}):
            cache = prompts.model(**prompts.inputs).past_key_values
            results.append(decoder(**given, past_key_values=cache).last_hidden_state)
            cache = prompts.model(**prompts.inputs).past_key_values
            results.append(prompts.model.model(input_ids=token, past_key_values=cache).last_hidden_state)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_a_mask_function_of_another_form_is_refused_in_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava(2, ragged=True)
    for function in (lambda batch_size, slots: None, lambda batch_size, **more: None):
        monkeypatch.setattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", {"sdpa": function})
        with prune_visual_tokens(prompts.model, "divprune", 9) as pruning:
            if "slots" in function.__code__.co_varnames:
                with pytest.raises(NotImplementedError, match="neither cache_position nor q_offset, only batch_size"):
                    prompts.model(**prompts.inputs)
                assert pruning.kept is None
            else:
                prompts.model(**prompts.inputs)
                assert pruning.kept is not None
