"""torch.compile of a pruned model: the same results, and no block is served by what was compiled for another."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers.vlm.checks import CLOSE
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

BLOCKS: tuple[dict[str, Any], ...] = (
    {"method": "coast", "layer": 1},
    {"method": "divprune"},
    {"method": "coast", "layer": 2, "compact_cache": True},
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def shallow() -> Prompts:
    """Three decoder layers: compiling takes as long as there are layers."""
    prompts = llava(2, ragged=True)
    decoder = prompts.model.model.language_model
    decoder.layers = decoder.layers[:3]
    decoder.config.num_hidden_layers = 3
    return prompts


def run(call: Callable[..., Any], prompts: Prompts) -> list[Tensor]:
    """A prefill and a decoding step."""
    mask = torch.nn.functional.pad(prompts.inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        out = call(**prompts.inputs)
        logits = [out.logits[:, -1]]
        out = call(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, past_key_values=out.past_key_values)
    return [*logits, out.logits[:, -1]]


def pruned(call: Callable[..., Any], prompts: Prompts, block: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    with prune_visual_tokens(prompts.model, keep=9, **block) as pruning:
        return run(call, prompts), pruning.kept


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **CLOSE)


def compile_decoder(model: nn.Module) -> Callable[..., Any]:
    model.model.language_model.compile(backend="eager")
    return model


def compile_model(model: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend="eager")
    return compiled


@pytest.mark.parametrize(("compiled", "blocks"), [(compile_decoder, 3), (compile_model, 2)], ids=["decoder", "model"])
def test_compiled_before_the_blocks(compiled: Callable[[nn.Module], Callable[..., Any]], blocks: int) -> None:
    prompts = shallow()
    plain = run(prompts.model, prompts)
    want = [pruned(prompts.model, prompts, block) for block in BLOCKS[:blocks]]
    call = compiled(prompts.model)
    same(run(call, prompts), plain)
    for block, (logits, kept) in zip(BLOCKS, want, strict=False):
        got, got_kept = pruned(call, prompts, block)
        same(got, logits)
        assert torch.equal(got_kept, kept)
    same(run(call, prompts), plain)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_compiled_inside_a_block() -> None:
    prompts = shallow()
    plain = run(prompts.model, prompts)
    want = [pruned(prompts.model, prompts, block) for block in BLOCKS[:2]]
    with prune_visual_tokens(prompts.model, keep=9, **BLOCKS[0]) as pruning:
        call = compile_decoder(prompts.model)
        same(run(call, prompts), want[0][0])
        assert torch.equal(pruning.kept, want[0][1])
    same(run(call, prompts), plain)
    got, kept = pruned(call, prompts, BLOCKS[1])
    same(got, want[1][0])
    assert torch.equal(kept, want[1][1])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
