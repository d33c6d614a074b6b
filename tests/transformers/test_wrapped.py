"""Models that are wrapped (PEFT), or whose weights wait on another device than the work is done on."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers.vlm.checks import generate, options_of
from tests.transformers.vlm.models import llava
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens


class Tuner(nn.Module):
    """A wrapper like PEFT's tuners: it has `model`, passes attributes on, and calls its forward without its hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


class Adapted(nn.Module):
    """A wrapper like a PeftModel: `base_model` is the tuner, get_base_model() the transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> Any:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class LowRank(nn.Module):
    """A layer like PEFT's LoRA layers, which replace the projections."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.up(self.down(x))
        return result


def adapted() -> tuple[Any, Any, dict[str, Tensor]]:
    """A LLaVA with changed projections, and the same one inside its wrappers."""
    prompts = llava(2, ragged=True)
    for layer in prompts.model.model.language_model.layers:
        for name in ("q_proj", "k_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    return prompts.model, Adapted(prompts.model).eval(), prompts.inputs


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_model_is_pruned_as_the_model_in_it(method: str) -> None:
    model, wrapped, inputs = adapted()
    more = {**options_of(method), "seed": 5}
    with prune_visual_tokens(model, method, 9, **more) as inner:
        expected = generate(model, inputs, 4)
    with prune_visual_tokens(wrapped, method, 9, **more) as outer:
        out = generate(wrapped, inputs, 4)
    assert torch.equal(out.sequences, expected.sequences)
    assert inner.kept is not None
    assert outer.kept is not None
    assert torch.equal(inner.kept, outer.kept)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    # forward of the wrapper skips the hooks of the model in it
    with torch.no_grad(), prune_visual_tokens(model, method, 9, **more):
        logits = model(**inputs).logits
    with torch.no_grad(), prune_visual_tokens(wrapped, method, 9, **more):
        assert torch.equal(wrapped(**inputs).logits, logits)
    assert torch.equal(wrapped(**inputs).logits, model(**inputs).logits)


def test_the_loss_is_the_same_whatever_is_called() -> None:
    model, wrapped, inputs = adapted()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 100, -100)
    with torch.no_grad(), prune_visual_tokens(wrapped, "coast", 9, layer=2):
        losses = [called(**inputs, labels=labels).loss for called in (wrapped, model)]
    with torch.no_grad(), prune_visual_tokens(model, "coast", 9, layer=2):
        losses.append(model(**inputs, labels=labels).loss)
    assert len(set(map(float, losses))) == 1


def test_a_wrapper_of_no_supported_model_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(NotImplementedError, match=r"is not supported; supported are .*llava"):
        prune_visual_tokens(Adapted(nn.Linear(2, 2)))


def test_random_draws_where_the_work_is_not_where_the_weights_wait() -> None:
    """Works as CPU offload does: a module's weights are on the meta device but for the time of its call."""
    prompts = llava(2, ragged=True)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "random", 9, seed=5) as plain:
        expected = prompts.model(**prompts.inputs).logits
    embedding = prompts.model.model.language_model.embed_tokens
    weight = embedding.weight
    waiting = nn.Parameter(weight.detach().to("meta"))

    def put(parameter: nn.Parameter) -> Any:
        return lambda *_: embedding._parameters.__setitem__("weight", parameter)

    embedding.register_forward_pre_hook(put(weight))
    embedding.register_forward_hook(put(waiting))
    put(waiting)()
    assert next(prompts.model.model.language_model.parameters()).is_meta
    with torch.no_grad(), prune_visual_tokens(prompts.model, "random", 9, seed=5) as pruning:
        assert torch.equal(prompts.model(**prompts.inputs).logits, expected)
    assert plain.kept is not None
    assert torch.equal(pruning.kept, plain.kept)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "without a cache"])
@pytest.mark.parametrize("method", METHODS)
def test_features_that_a_hook_made_others_of_are_those_that_generate_encoded(method: str, cached: bool) -> None:
    """Does what accelerate's hooks do, which send all that a module is called with to its device."""
    prompts = llava(2, ragged=True)
    more = {**options_of(method), "seed": 5}
    with prune_visual_tokens(prompts.model, method, 9, **more) as plain:
        expected = generate(prompts.model, prompts.inputs, 3, use_cache=cached)

    def sent(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoded = kwargs.get("mm_encoder_outputs") or {}
        others = {kind: type(features)(dict(features)) for kind, features in encoded.items()}
        return args, {**kwargs, **({"mm_encoder_outputs": others} if others else {})}

    prompts.model.model.register_forward_pre_hook(sent, with_kwargs=True)
    with prune_visual_tokens(prompts.model, method, 9, **more) as pruning:
        out = generate(prompts.model, prompts.inputs, 3, use_cache=cached)
    assert torch.equal(out.sequences, expected.sequences)
    assert plain.kept is not None
    assert torch.equal(pruning.kept, plain.kept)
