"""Inside a block: copies of the model, saving it, and another attention implementation."""

import copy
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers.vlm import models_qwen
from tests.transformers.vlm.checks import LAYER, assert_decoded_like_the_oracle, drops_of, generate, options_of
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.models_crops import internvl
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens

over_methods = pytest.mark.parametrize("method", ["coast", "adafv", "divprune"])


def logits_of(prompts: Prompts, model: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = (prompts.model if model is None else model)(**prompts.inputs).logits
    return logits


def traces_in(model: nn.Module) -> list[str]:
    """What of a block is in a model: hooks, attributes and names."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if "hooks" in name and isinstance(value, dict):
                found += [f"{path}.{name}"] * len(value)
            elif callable(value) and not isinstance(value, (nn.Module, type)):
                found.append(f"{path}.{name}")
        config = getattr(module, "config", None)
        if config is not None and "tokenprune" in str(config._attn_implementation):
            found.append(f"{path}.config")
    return found


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


class Noting:
    """A user's hook."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, *_: Any) -> None:
        self.seen.append(1)


class Encoder:
    """A user's replacement of a method."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


@pytest.mark.parametrize("through", [copy.deepcopy, pickled, saved])
@over_methods
def test_a_copy_made_inside_the_block_is_of_the_model_outside(method: str, through: Any) -> None:
    prompts = llava(2, ragged=True)
    try:
        clean = traces_in(through(prompts.model))
    except AttributeError as error:
        pytest.skip(f"this version of transformers makes models that nothing can pickle: {error}")
    plain = logits_of(llava(2, ragged=True))
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        assert traces_in(prompts.model) != clean
        # Before the first forward: it may install hooks of transformers, which nothing can pickle.
        copied = through(prompts.model)
        assert traces_in(copied) == clean
        want = logits_of(prompts)
        kept = pruning.kept
        assert want.shape != plain.shape
        assert torch.equal(logits_of(prompts, copied), plain)
        assert pruning.kept is kept
        with prune_visual_tokens(copied, method, 9, **options_of(method)):
            assert torch.equal(logits_of(prompts, copied), want)
    assert torch.equal(logits_of(prompts, copied), plain)
    generate(copied, prompts.inputs, 2)


def qwen3() -> Prompts:
    return models_qwen.prompts(models_qwen.model("qwen3_vl"), [[3, (1, 8, 8), 5]])


@pytest.mark.parametrize("make", [internvl, qwen3])
def test_copies_of_models_with_watched_methods_and_deepstack(make: Any) -> None:
    prompts = make()
    plain = logits_of(prompts)
    clean = traces_in(copy.deepcopy(prompts.model))
    with prune_visual_tokens(prompts.model, "adafv", 5):
        copied = copy.deepcopy(prompts.model)
        assert traces_in(copied) == clean
        for parameter in prompts.model.parameters():
            parameter.data.zero_()
        assert torch.equal(logits_of(prompts, copied), plain)  # nothing of it is the original's


def test_copies_of_parts_and_of_configurations() -> None:
    prompts = llava()
    core = prompts.model.model
    parts = [core.vision_tower, core.language_model, core.language_model.layers, core.language_model.layers[1]]
    clean = [traces_in(part) for part in parts]
    with prune_visual_tokens(prompts.model, "adafv", 9):
        assert [traces_in(part) for part in parts] != clean
        assert [traces_in(copy.deepcopy(part)) for part in parts] == clean
        for config in (prompts.model.config, core.vision_tower.config, core.language_model.config):
            for copied in (copy.deepcopy(config), copy.copy(config), pickled(config)):
                assert copied._attn_implementation == "sdpa"
        assert copy.deepcopy(prompts.model.config).vision_config._attn_implementation == "sdpa"
    assert copy.deepcopy(core).language_model.config._attn_implementation == "sdpa"


def test_users_hooks_and_attributes_are_in_the_copy() -> None:
    prompts = llava()
    seen: list[Any] = []
    core = prompts.model.model
    core.get_image_features = Encoder(core.get_image_features)
    layer = core.language_model.layers[0]
    before = layer.register_forward_pre_hook(Noting(seen))
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        inside = layer.register_forward_hook(Noting(seen))
        copied = copy.deepcopy(prompts.model)
    assert isinstance(copied.model.get_image_features, Encoder)
    assert isinstance(core.get_image_features, Encoder)
    layer = copied.model.language_model.layers[0]
    assert [type(hook) for hook in layer._forward_pre_hooks.values()] == [Noting]
    assert [type(hook) for hook in layer._forward_hooks.values()] == [Noting]
    assert len(layer._forward_pre_hooks_with_kwargs) == 0
    before.remove()
    inside.remove()


def test_no_class_is_copied_otherwise_after_the_blocks() -> None:
    import copyreg

    one, two = llava(), llava()
    clean = traces_in(one.model)
    before = dict(copyreg.dispatch_table)
    with prune_visual_tokens(one.model, "coast", 9):
        with prune_visual_tokens(two.model, "adafv", 9):
            assert dict(copyreg.dispatch_table) != before
            assert traces_in(copy.deepcopy(one.model)) == clean
        assert traces_in(copy.deepcopy(one.model)) == clean
        assert traces_in(copy.deepcopy(two.model)) == clean
    assert dict(copyreg.dispatch_table) == before


def test_a_saved_model_has_no_name_of_ours(tmp_path: Path) -> None:
    prompts = llava(2)
    plain = logits_of(prompts)
    with prune_visual_tokens(prompts.model, "adafv", 9):
        prompts.model.save_pretrained(tmp_path)
        state = {name: t.clone() for name, t in prompts.model.state_dict().items()}
    written = (tmp_path / "config.json").read_text() + (tmp_path / "generation_config.json").read_text()
    assert "tokenprune" not in written
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"
    loaded = type(prompts.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(prompts, loaded), plain)
    assert sorted(state) == sorted(prompts.model.state_dict())


# --- another attention implementation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_attention_set_inside_the_block_is_followed_and_stays(method: str) -> None:
    prompts = llava(2, ragged=True)
    options = {"positions": "original", "seed": 1, **options_of(method)}
    kept = []
    for at in ("before", "inside"):
        prompts.model.set_attn_implementation("eager" if at == "before" else "sdpa")
        with prune_visual_tokens(prompts.model, method, 9, **options) as pruning:
            if at == "inside":
                prompts.model.set_attn_implementation("eager")
            out = generate(prompts.model, prompts.inputs, 3)
        kept.append(pruning.kept)
        assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER), out)
        config = prompts.model.config
        assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    assert torch.equal(*kept)


def test_attentions_set_back_and_forth_leave_no_name_behind() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompts = llava(2)
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
        for name in ("eager", "sdpa", "eager", "sdpa"):
            prompts.model.set_attn_implementation(name)
            logits_of(prompts)
            assert pruning.stats["after"] == [9, 9]
    assert prompts.model.config.text_config._attn_implementation == "sdpa"
    assert dict(ALL_ATTENTION_FUNCTIONS._global_mapping) == before


def test_a_name_that_attention_reads_is_right_in_every_thread() -> None:
    """Two threads in one attention function that looks its name up in the configuration, as FlashAttention does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompts = llava(2)
    barrier = threading.Barrier(2, timeout=60)
    names: list[str] = []

    def reads_its_name(module: Any, *args: Any, **kwargs: Any) -> Any:
        barrier.wait()
        names.append(module.config._attn_implementation)
        barrier.wait()
        return sdpa_attention_forward(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("reads_its_name", reads_its_name)
    ALL_MASK_ATTENTION_FUNCTIONS.register("reads_its_name", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        config = prompts.model.config.text_config
        config._attn_implementation = "reads_its_name"
        results: dict[int, Tensor] = {}
        with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
            ours = config._attn_implementation
            threads = [threading.Thread(target=lambda n=n: results.update({n: logits_of(prompts)})) for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert config._attn_implementation == ours
        assert pruning.stats["prefills"] == 2
    finally:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop("reads_its_name", None)
        config._attn_implementation = "sdpa"
    assert names == ["reads_its_name"] * 8
    assert torch.equal(results[0], results[1])
