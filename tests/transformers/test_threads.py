"""One block serves several threads, forwards inside of forwards, and models that share parts with others."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers.vlm import models_qwen
from tests.transformers.vlm.checks import LAYER, generate, options_of, over_four, over_four_and_compact
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.models_crops import llava_onevision
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


@contextmanager
def in_step(modules: Sequence[nn.Module], threads: int) -> Iterator[None]:
    """In front of each of the modules, every thread waits for all others: they are in the same forward together."""
    barrier = threading.Barrier(threads, timeout=120)

    def wait(*_: Any) -> None:
        barrier.wait()

    handles = [module.register_forward_pre_hook(wait) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def same_logits(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for g, w in zip(got.logits, want.logits, strict=True):
        assert torch.equal(g, w)


def other_prompts(prompts: Prompts, seed: int) -> dict[str, Tensor]:
    """Prompts of as many tokens with other text and other images."""
    draw = torch.Generator().manual_seed(seed)
    ids = prompts.inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(prompts.visual))
    text = torch.where(visual | (ids < 3) | (ids >= 90), ids, torch.randint(3, 90, ids.shape, generator=draw))
    pixels = {n: torch.randn(t.shape, generator=draw) for n, t in prompts.inputs.items() if n.startswith("pixel")}
    return {**prompts.inputs, "input_ids": text, **pixels}


# --- threads ----------------------------------------------------------------------------------------------------------


@over_four_and_compact
def test_threads_in_one_block_generate_what_each_generates_alone(method: str, compact: bool) -> None:
    prompts = llava(2, ragged=True)
    core = prompts.model.model
    inputs = [prompts.inputs, other_prompts(prompts, 1), llava(1, images=2).inputs]
    joint = [core.vision_tower, core.language_model.layers[0], core.language_model.layers[LAYER]]
    with prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning:
        want = [generate(prompts.model, given, 6) for given in inputs]
        with in_step(joint, 3):
            got = at_once([lambda given=given: generate(prompts.model, given, 6) for given in inputs])
        assert pruning.stats["prefills"] == 6
    for g, w in zip(got, want, strict=True):
        same_logits(g, w)


@pytest.mark.parametrize("method", ["coast", "adafv", "sts"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_threads_with_watched_images_and_deepstack(family: str, method: str) -> None:
    """What the adapters learn of the images belongs to their prompt too."""
    if family == "llava_onevision":
        first = llava_onevision()
    else:
        first = models_qwen.prompts(models_qwen.model(family), [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]])
    inputs = [first.inputs, other_prompts(first, 1)]
    layers = first.model.model.language_model.layers

    def last_row(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = first.model(**given).logits[:, -1]
        return logits

    with prune_visual_tokens(first.model, method, 9, **options_of(method)):
        want = [last_row(given) for given in inputs]
        with in_step([layers[0], layers[LAYER]], 2):
            got = at_once([lambda given=given: last_row(given) for given in inputs])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_random_with_a_seed_draws_as_some_order_of_the_threads() -> None:
    prompts = llava(2)

    def logits() -> Tensor:
        with torch.no_grad():
            last: Tensor = prompts.model(**prompts.inputs).logits[:, -1]
        return last

    with prune_visual_tokens(prompts.model, "random", 9, seed=1):
        want = [logits() for _ in range(8)]
    with (
        prune_visual_tokens(prompts.model, "random", 9, seed=1),
        in_step([prompts.model.model.language_model.layers[0]], 4),
    ):
        got = [row for rows in at_once([lambda: [logits(), logits()]] * 4) for row in rows]
    order = [next(n for n, w in enumerate(want) if torch.equal(g, w)) for g in got]
    assert sorted(order) == list(range(8))


def test_a_report_is_of_one_prefill_and_appears_when_it_is_finished() -> None:
    prompts = llava(2)
    other = llava(3, ragged=True)
    seen: list[Any] = []
    with prune_visual_tokens(prompts.model, "sts", 9, layer=LAYER) as pruning:

        def facts() -> list[Any]:
            assert pruning.kept is not None
            return [pruning.kept.tolist(), {n: t.tolist() for n, t in pruning.kept_at.items()},
                    pruning.stats["after"], pruning.stats["layers"], pruning.stats["prefills"]]  # fmt: skip

        with torch.no_grad():
            prompts.model(**prompts.inputs)
            first = facts()
            last = prompts.model.model.language_model.layers[-1]
            handle = last.register_forward_pre_hook(lambda *_: seen.append(facts()))
            prompts.model(**other.inputs)
            handle.remove()
        assert seen == [first]
        assert pruning.stats["prefills"] == 2
        assert pruning.stats["after"] == [9, 9, 9]
        with pytest.raises(ValueError, match=r"visual tokens|[Ii]mage"):  # the prompt has other images than the tower
            prompts.model(**{**other.inputs, "pixel_values": prompts.inputs["pixel_values"]})
        assert pruning.stats["after"] == [9, 9, 9]
        assert pruning.stats["prefills"] == 2


# --- forwards inside of others ----------------------------------------------------------------------------------------


class Nested:
    """A streamer that generates something else each time it is given tokens."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.results = call, []

    def put(self, tokens: Tensor) -> None:
        self.results.append(self.call())

    def end(self) -> None:
        pass


@over_four
def test_generation_inside_a_streamers_callback(method: str) -> None:
    """It comes after the images were encoded and before the prefill, and between the steps."""
    prompts = llava(1)
    other = other_prompts(prompts, 1)
    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        want, inner = generate(prompts.model, prompts.inputs, 4), generate(prompts.model, other, 3)
        streamer = Nested(lambda: generate(prompts.model, other, 3))
        got = generate(prompts.model, prompts.inputs, 4, streamer=streamer)
    assert len(streamer.results) > 3
    same_logits(got, want)
    for result in streamer.results:
        same_logits(result, inner)


@over_four
def test_a_forward_inside_of_an_encoding_of_another(method: str) -> None:
    """What is seen of each one's images is written down for its own prompt."""
    prompts, other = llava(2, ragged=True), llava(1, images=2)
    inner: list[Tensor] = []

    def forward(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = prompts.model(**given).logits[:, -1]
        return logits

    def again(*_: Any) -> None:
        handle.remove()
        inner.append(forward(other.inputs))

    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        want = [forward(given) for given in (prompts.inputs, other.inputs)]
        handle = prompts.model.model.vision_tower.register_forward_pre_hook(again)
        assert torch.equal(forward(prompts.inputs), want[0])
    assert torch.equal(inner[0], want[1])


@over_four
def test_a_forward_inside_of_a_layer_of_another(method: str) -> None:
    prompts, other = llava(2, ragged=True), llava(1, images=2)
    depth, inner = [0], []

    def forward(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = prompts.model(**given).logits[:, -1]
        return logits

    def again(*_: Any) -> None:
        if depth[0] == 0:
            depth[0] = 1
            inner.append(forward(other.inputs))
            depth[0] = 0

    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        want = [forward(given) for given in (prompts.inputs, other.inputs)]
        handle = prompts.model.model.language_model.layers[1].register_forward_pre_hook(again)
        assert torch.equal(forward(prompts.inputs), want[0])
        handle.remove()
    assert len(inner) == 1
    assert torch.equal(inner[0], want[1])


@over_four
@pytest.mark.parametrize("where", ["tower", "layer"])
def test_the_block_goes_on_after_an_interrupt(method: str, where: str) -> None:
    """It is no Exception: torch runs no hook behind it."""
    prompts = llava(2, ragged=True)
    core = prompts.model.model

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
        want = generate(prompts.model, prompts.inputs, 3)
        module = core.vision_tower if where == "tower" else core.language_model.layers[LAYER]
        handle = module.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            prompts.model(**prompts.inputs)
        with pytest.raises(KeyboardInterrupt):
            generate(prompts.model, prompts.inputs, 3)
        handle.remove()
        same_logits(generate(prompts.model, prompts.inputs, 3), want)


# --- shared parts -----------------------------------------------------------------------------------------------------


def sharing_a_tower() -> tuple[Prompts, Prompts]:
    one, two = llava(2, ragged=True), llava(1, images=2)
    with torch.no_grad():
        for parameter in two.model.model.language_model.parameters():
            parameter.mul_(1.1)
    two.model.model.vision_tower = one.model.model.vision_tower
    two.model.config.vision_config = one.model.config.vision_config
    return one, two


@pytest.mark.parametrize("methods", [("adafv", "adafv"), ("adafv", "coast"), ("divprune", "adafv")])
def test_two_blocks_on_models_that_share_their_vision_tower(methods: tuple[str, str]) -> None:
    pair = sharing_a_tower()
    one, two = pair
    name = one.model.config.vision_config._attn_implementation
    want = []
    for prompts, method in zip(pair, methods, strict=True):
        with prune_visual_tokens(prompts.model, method, 9, **options_of(method)):
            want.append(generate(prompts.model, prompts.inputs, 4))
    blocks = [prune_visual_tokens(p.model, m, 9, **options_of(m)) for p, m in zip(pair, methods, strict=True)]
    for first_out in (0, 1):
        for block in blocks:
            block.__enter__()
        joint = [one.model.model.vision_tower]
        with in_step(joint, 2):
            got = at_once([lambda p=p: generate(p.model, p.inputs, 4) for p in pair])
        for g, w in zip(got, want, strict=True):
            same_logits(g, w)
        streamer = Nested(lambda: generate(two.model, two.inputs, 4))
        same_logits(generate(one.model, llava(1).inputs, 2, streamer=streamer), generate(one.model, llava(1).inputs, 2))
        same_logits(streamer.results[0], want[1])
        blocks[first_out].__exit__()
        left = 1 - first_out
        same_logits(generate(pair[left].model, pair[left].inputs, 4), want[left])
        blocks[left].__exit__()
        assert one.model.config.vision_config._attn_implementation == name


def test_a_model_that_shares_its_decoder_with_a_pruned_one_is_not_pruned() -> None:
    """At once, and inside of a forward of the pruned one: while its images are encoded, and between its layers."""
    one, two = llava(2, ragged=True), llava(2, ragged=True)
    two.inputs = other_prompts(two, 1)
    with torch.no_grad():
        for parameter in two.model.model.vision_tower.parameters():
            parameter.mul_(1.1)
    two.model.model.language_model = decoder = one.model.model.language_model
    two.model.config.text_config = one.model.config.text_config
    plain = generate(two.model, two.inputs, 4)

    def forward(prompts: Prompts) -> Tensor:
        with torch.no_grad():
            logits: Tensor = prompts.model(**prompts.inputs).logits
        return logits

    unpruned = forward(two)
    with prune_visual_tokens(one.model, "coast", 9, layer=LAYER) as pruning:
        want, alone = generate(one.model, one.inputs, 4), forward(one)
        same_logits(generate(two.model, two.inputs, 4), plain)
        for module in (one.model.model.vision_tower, decoder.layers[1]):
            inner: list[Tensor] = []

            def again(*_: Any, inner: list[Tensor] = inner) -> None:
                if not inner:
                    inner.append(unpruned)
                    inner[0] = forward(two)

            handle = module.register_forward_pre_hook(again)
            assert torch.equal(forward(one), alone)
            handle.remove()
            assert torch.equal(inner[0], unpruned)
        with in_step([decoder.layers[0], decoder.layers[LAYER]], 2):
            got = at_once([lambda p=p: generate(p.model, p.inputs, 4) for p in (one, two)])
        same_logits(got[0], want)
        same_logits(got[1], plain)
        assert pruning.stats["prefills"] == 5
        with pytest.raises(RuntimeError, match="or one that shares its config"):
            prune_visual_tokens(two.model, "coast", 9, layer=LAYER).__enter__()
