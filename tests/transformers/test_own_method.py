"""Functions of users as methods: what they are given, what may come back, and what is refused before the prefill."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.test_llava import BATCHES, sample_alone, shown_by_an_unpruned_run
from tests.transformers.vlm import models_crops
from tests.transformers.vlm.checks import CLOSE, LAYER, assert_decoded_like_the_oracle, drops_of, generate
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import choose, prune_visual_tokens, registry
from tokenprune_kernels.methods import (
    ARGUMENTS,
    Method,
    Selection,
    Stage,
    get_method,
    register_method,
    unregister_method,
)

TOKENS = 36


def longest(features: Tensor, present: Tensor, k: int, *, power: float = 1.0) -> Tensor:
    return features.norm(dim=-1).pow(power).masked_fill(~present, -torch.inf).topk(k).indices


def forward(prompts: Prompts, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prompts.model(**{**prompts.inputs, **more}).logits
    return logits


@pytest.fixture
def named() -> Iterator[str]:
    """`longest` under a name."""
    register_method("longest_token", longest)
    yield "longest_token"
    unregister_method("longest_token")


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", [None, LAYER])
def test_a_function_chooses_and_the_model_goes_on(batch: str, layer: int | None) -> None:
    """In front of the language model or, when a layer is given, in front of that; indices come back in any order."""
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    with prune_visual_tokens(prompts.model, longest, 9, layer=layer) as pruning:
        out = generate(prompts.model, prompts.inputs, 4)
    assert pruning.method == pruning.stats["method"] == "longest"
    assert pruning.stats["layers"] == [layer or 0]
    for b in range(BATCHES[batch][0]):
        seen = shown_by_an_unpruned_run(prompts, sample_alone(prompts, b))
        expected = seen["embeds" if layer is None else "hidden"].norm(dim=-1).topk(9).indices.sort().values
        assert torch.equal(pruning.kept[b], expected[0])
    prompts.model.set_attn_implementation("sdpa")
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, layer or 0), out)


def test_a_registered_function_has_a_name_and_options(named: str) -> None:
    prompts = llava(2, ragged=True)
    kept = []
    for method, more in ((longest, {}), (named, {}), (named, {"power": -1.0})):
        with prune_visual_tokens(prompts.model, method, 0.25, **more) as pruning:
            forward(prompts)
        kept.append(pruning.kept)
        assert pruning.stats["method"] == (named if method == named else "longest")
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_what_asks_for_attention_works_at_a_layer() -> None:
    prompts = llava(2, ragged=True)

    def attended(query: Tensor, key: Tensor, key_indices: Tensor, query_mask: Tensor, k: int, **_: Any) -> Tensor:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query @ keys.mT).mean(1).masked_fill(~query_mask.unsqueeze(-1), 0.0).sum(1)
        return logits.gather(1, key_indices).topk(k).indices

    with prune_visual_tokens(prompts.model, attended, 9) as default:
        forward(prompts)
    with prune_visual_tokens(prompts.model, attended, 9, layer=1) as first:
        forward(prompts)
    assert (default.stats["layers"], first.stats["layers"]) == ([2], [1])
    assert not torch.equal(default.kept, first.kept)


def test_samples_that_keep_different_numbers_are_calls_of_their_own() -> None:
    prompts = models_crops.llava_next(models_crops.RAGGED)
    calls: list[tuple[int, list[int]]] = []

    def spy(features: Tensor, present: Tensor, k: int) -> Tensor:
        calls.append((k, present.sum(1).tolist()))
        return longest(features, present, k)

    with prune_visual_tokens(prompts.model, spy, 0.5) as pruning:
        forward(prompts)
    before, after = pruning.stats["before"], pruning.stats["after"]
    assert len(set(before)) > 1
    assert calls == sorted((k, [n]) for k, n in zip(after, before, strict=True))
    assert (pruning.kept >= 0).sum(1).tolist() == after


def test_two_stages_of_published_functions() -> None:
    prompts = llava(2, ragged=True)
    stages = (Stage(methods.divprune, "model", share=3), Stage(methods.fastv, "layer"))
    with prune_visual_tokens(prompts.model, Method("both", stages), 6, first="outlier") as pruning:
        out = generate(prompts.model, prompts.inputs, 3)
    assert [kept.shape[1] for kept in pruning.kept_at.values()] == [18, 6]
    assert list(pruning.kept_at) == pruning.stats["layers"] == [0, 2]
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, 2), out)


@pytest.mark.parametrize("layer", [None, 2])
def test_a_paper_that_renumbers_does_so_wherever_it_prunes(layer: int | None) -> None:
    prompts = llava(2, ragged=True)
    method = Method("mine", (Stage(longest),), positions="renumber")
    with prune_visual_tokens(prompts.model, method, 9, layer=layer) as pruning:
        out = generate(prompts.model, prompts.inputs, 3)
    drops = drops_of(prompts, pruning, layer or 0)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=True)


def test_layers_by_default_are_those_of_the_papers() -> None:
    names = [family.name for family in registry.families()]
    for method in ("coast", "sts", "adaptprune", "fastv"):
        described = get_method(method)
        assert {*described.layers} <= {*names}, "no family has this name"
        for name in names:
            expected = 14 if method == "coast" and name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL") else 2
            assert described.layers.get(name, described.layer) == expected


def test_a_seed_is_a_generator() -> None:
    prompts = llava(2)

    def drawn(present: Tensor, generator: torch.Generator | None, k: int) -> Tensor:
        assert generator is not None
        return torch.rand(present.shape, generator=generator).topk(k).indices

    kept = []
    for seed in (0, 0, 1):
        with prune_visual_tokens(prompts.model, drawn, 9, seed=seed) as pruning:
            forward(prompts)
        kept.append(pruning.kept)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


# --- what is given ----------------------------------------------------------------------------------------------------


def test_every_argument_can_be_made() -> None:
    assert set(choose.SOURCES) == set(ARGUMENTS)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_argument_is_what_an_unpruned_eager_run_shows(batch: str) -> None:
    prompts = llava(BATCHES[batch][0], ragged=BATCHES[batch][1])
    length = prompts.inputs["input_ids"].shape[1]
    given: dict[str, Any] = {}

    def spy(k: int, **arguments: Any) -> Tensor:
        given.update(arguments)
        return torch.arange(k).expand(len(arguments["present"]), k)

    method = Method("spy", (Stage(spy, "layer", needs=[*ARGUMENTS]),), layer=LAYER)
    with prune_visual_tokens(prompts.model, method, 9, seed=3):
        generate(prompts.model, prompts.inputs, 1)  # which numbers positions without the padding
    assert set(given) == set(ARGUMENTS)
    assert (given["n"], given["count"], given["causal"], given["lse"]) == (TOKENS, TOKENS, True, None)
    assert given["mask"] is given["input_mask"] is None
    assert given["scale"] == prompts.model.model.language_model.layers[0].self_attn.scaling
    assert given["generator"].initial_seed() == 3
    assert bool(given["present"].all())
    assert given["features"] is given["visual_embeddings"]
    assert (given["key_mask"] is None) == (batch == "one")
    for b in range(BATCHES[batch][0]):
        seen = shown_by_an_unpruned_run(prompts, sample_alone(prompts, b))
        real = slice(length - seen["key"].shape[2], None)  # padding is on the left
        text = given["text_mask"][b]
        assert torch.equal(given["query_mask"][b], text)
        close = {
            "features": "hidden", "unrotated_key": "keys_before_rope", "saliency": "saliency", "positions": "positions",
            "input_features": "embeds",
        }  # fmt: skip
        for name, shown in close.items():
            torch.testing.assert_close(given[name][b].double(), seen[shown][0].double(), **CLOSE)
        torch.testing.assert_close(given["query"][b][:, text], seen["query"][0], **CLOSE)
        torch.testing.assert_close(given["key"][b][:, real], seen["key"][0], **CLOSE)
        torch.testing.assert_close(given["text_embeddings"][b][text], seen["text_hidden"][0], **CLOSE)
        torch.testing.assert_close(given["input_text"][b][text], seen["text"][0], **CLOSE)
        assert torch.equal(given["key_indices"][b] - real.start, seen["visual"][0])
        assert torch.equal(given["query_positions"][b][text] - real.start, seen["text_positions"][0])
        assert given["key_mask"] is None or given["key_mask"][b].nonzero()[0] == real.start
        assert torch.equal(given["stacked_positions"][b, :, :2], given["positions"][b])
        assert (given["stacked_positions"][b, :, 2] == 0).all()
        assert (given["grid"][b] == 6).all()
        assert (given["groups"][b] == 0).all()


def test_only_what_is_asked_for_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava(2)
    asked: list[str] = []
    for name, make in choose.SOURCES.items():

        def noted(context: Any, name: str = name, make: Callable[..., Any] = make) -> Any:
            asked.append(name)
            return make(context)

        monkeypatch.setitem(choose.SOURCES, name, noted)
    names = [c._attn_implementation for c in (prompts.model.config.text_config, prompts.model.config.vision_config)]
    with prune_visual_tokens(prompts.model, longest, 9):
        forward(prompts)
        now = [c._attn_implementation for c in (prompts.model.config.text_config, prompts.model.config.vision_config)]
    assert asked == ["features", "present"]
    assert now[1] == names[1]  # the tower's attention is not watched


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda k: list(range(k)), TypeError, r"must return indices \[B, k\] or a Selection, got list"),
        (lambda k: torch.arange(k), ValueError, r"int64 indices \[B, k\] = \[2, 9\] on cpu, got torch.int64 \[9\]"),
        (lambda k: torch.ones(2, TOKENS), ValueError, r"got torch.float32 \[2, 36\]"),
        (lambda k: torch.arange(k).int().expand(2, k), ValueError, r"got torch.int32 \[2, 9\] on cpu"),
        (lambda k: torch.ones(2, k, dtype=torch.int64), ValueError, "9 distinct indices of each sample"),
        (lambda k: torch.arange(TOKENS - k + 1, TOKENS + 1).expand(2, k), ValueError, "9 distinct indices"),
        (lambda k: torch.arange(-1, k - 1).expand(2, k), ValueError, "9 distinct indices"),
        (
            lambda k: Selection(torch.arange(k).flip(0).expand(2, k), torch.full((2,), k), {}),
            ValueError, "distinct indices of each sample's visual tokens, ascending in a Selection, got",
        ),
    ],
)  # fmt: skip
def test_what_is_no_choice_is_named(give: Callable[[int], Any], error: type[Exception], message: str) -> None:
    prompts = llava(2)

    def mine(k: int) -> Any:
        return give(k)

    told = pytest.raises(error, match=f"prune_visual_tokens: mine .*{message}")
    with prune_visual_tokens(prompts.model, mine, 9), told:
        forward(prompts)


def test_the_padding_of_shorter_samples_is_no_choice() -> None:
    prompts = models_crops.llava_next(models_crops.RAGGED)

    def last(present: Tensor, k: int) -> Tensor:
        return torch.arange(present.shape[1] - k, present.shape[1]).expand(len(present), k)

    with prune_visual_tokens(prompts.model, last, 5), pytest.raises(ValueError, match="last must return k = 5"):
        forward(prompts)


# --- what is refused --------------------------------------------------------------------------------------------------


def needing(*names: str) -> Method:
    return Method("mine", (Stage(lambda k, **given: None, needs=names),))


def test_what_the_model_cannot_give_is_refused_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = llava()
    core = prompts.model.model
    fused = torch.nn.Module()
    with monkeypatch.context() as patch:
        patch.setattr(core.language_model.layers[1], "self_attn", fused)
        with pytest.raises(NotImplementedError, match="mine compares keys before RoPE, and Module has no k_proj"):
            prune_visual_tokens(prompts.model, needing("unrotated_key"), 9, layer=1)
    with monkeypatch.context() as patch:
        patch.setattr(core, "vision_tower", fused)
        with pytest.raises(NotImplementedError, match="mine needs the attention of the vision tower"):
            prune_visual_tokens(prompts.model, needing("saliency"), 9).__enter__()
    with monkeypatch.context() as patch:
        without = dataclasses.replace(registry.family_of(prompts.model), saliency=None)
        patch.setitem(registry._FAMILIES, "llava", without)
        with pytest.raises(NotImplementedError, match=r"mine has no saliency for LLaVA-1\.5"):
            prune_visual_tokens(prompts.model, needing("saliency"), 9)


@pytest.mark.parametrize(
    ("method", "more", "error", "message"),
    [
        (lambda features: features, {}, TypeError, "the function must take k, the number of tokens to keep"),
        (longest, {"pover": 2.0}, TypeError, "longest takes no option 'pover'; its options are power"),
        (lambda pixels, k: pixels, {}, TypeError, "<lambda> needs 'pixels', which is no option"),
        (Method("fixed", (Stage(longest, "model"),)), {"layer": 2}, ValueError, "fixed works before the language"),
        (longest, {"layer": 4}, ValueError, r"layer must lie in \[1, 3\]"),
        ("longest", {}, ValueError, "method must be one of coast, .*, random, got 'longest'"),
        (None, {}, ValueError, "method must be one of coast, .* got None"),
    ],
)
def test_a_call_that_cannot_work_is_refused(method: Any, more: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune_visual_tokens(llava().model, method, 9, **more)
