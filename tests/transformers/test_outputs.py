"""What a model gives besides its logits inside a block: hidden states and attentions, as without one."""

from collections.abc import Callable

import pytest
import torch

from tests.transformers.vlm import models_qwen
from tests.transformers.vlm.checks import LAYER, options_of
from tests.transformers.vlm.models import Prompts, llava
from tests.transformers.vlm.models_crops import internvl, llava_next, llava_onevision
from tokenprune_kernels.integrations.transformers import prune_visual_tokens


def qwen(name: str) -> Callable[[], Prompts]:
    return lambda: models_qwen.prompts(models_qwen.model(name), [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]])


MAKE = {
    "llava": lambda: llava(2, ragged=True), "llava_next": llava_next, "llava_onevision": llava_onevision,
    "internvl": internvl, **{name: qwen(name) for name in models_qwen.NAMES},
}  # fmt: skip
over_families = pytest.mark.parametrize("family", MAKE)


@over_families
@pytest.mark.parametrize("method", ["coast", "divprune"])
def test_hidden_states_with_all_tokens_are_those_of_the_model(family: str, method: str) -> None:
    """Whoever asks first, inside the block or before it: transformers installs what records them then."""
    inside_first, before_first = MAKE[family](), MAKE[family]()
    with torch.no_grad():
        want = before_first.model(**before_first.inputs, output_hidden_states=True).hidden_states
        for prompts in (inside_first, before_first):
            with prune_visual_tokens(prompts.model, method, 1.0):
                got = prompts.model(**prompts.inputs, output_hidden_states=True).hidden_states
            assert len(got) == len(want) == 5
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w)


@over_families
def test_hidden_states_in_front_of_the_pruning_layer_are_the_unpruned_ones(family: str) -> None:
    prompts, unpruned = MAKE[family](), MAKE[family]()
    with torch.no_grad():
        want = unpruned.model(**unpruned.inputs, output_hidden_states=True).hidden_states
        with prune_visual_tokens(prompts.model, "coast", 5, **options_of("coast")) as pruning:
            out = prompts.model(**prompts.inputs, output_hidden_states=True)
    length = prompts.inputs["input_ids"].shape[1]
    for index in range(LAYER + 1):
        assert torch.equal(out.hidden_states[index], want[index])
    after = out.logits.shape[1]
    assert after < length
    assert [h.shape[1] for h in out.hidden_states] == [length] * (LAYER + 1) + [after] * 2
    assert pruning.stats["layers"] == [LAYER]
