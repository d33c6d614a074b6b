"""SparseVLM inside the model: what every stage of a schedule is given, and that the model goes on with its rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers import test_qwen
from tests.transformers.vlm import oracle, runs_crops, runs_qwen
from tests.transformers.vlm.checks import assert_decoded_like_the_oracle, drops_of, generate, spy_on
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.methods import Selection

FAMILIES: dict[str, Callable[[], Prompts]] = {
    "llava": lambda: llava(3, ragged=True),
    **{name: lambda name=name: runs_qwen.batch(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{name: lambda name=name: runs_crops.prompts_of(name, "several") for name in runs_crops.FAMILIES},
}
Call = tuple[dict[str, Any], Selection]


def spied(patch: pytest.MonkeyPatch) -> list[Call]:
    """What the function is given in blocks from now on, and what it returns."""
    calls: list[Call] = []

    def spy(**given: Any) -> Selection:
        calls.append((given, methods.sparsevlm(**given)))
        return calls[-1][1]

    spy_on(patch, "sparsevlm", "sparsevlm", spy)
    return calls


def by_stage(pruning: Any, calls: list[Call]) -> list[list[tuple[list[int], Call]]]:
    """The calls of each stage with the samples of each: those with equal budgets and equal numbers of tokens."""
    left, stages, rest = pruning.stats["before"], [], iter(calls)
    for kept in pruning.kept_at.values():
        now = (kept >= 0).sum(1).tolist()
        alike = list(zip(now, left, strict=True))
        stages.append([([b for b, of in enumerate(alike) if of == one], next(rest)) for one in sorted(set(alike))])
        left = now
    assert next(rest, None) is None
    return stages


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_stage_is_given_the_embeddings_of_all_that_the_prompt_had(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, embeds, calls = FAMILIES[family](), [], spied(monkeypatch)
    first = prompts.model.model.language_model.layers[0]
    handle = first.register_forward_pre_hook(
        lambda m, args, given: embeds.append(args[0] if args else given["hidden_states"]), with_kwargs=True
    )
    with prune_visual_tokens(prompts.model, "sparsevlm", {1: 0.5, 3: 0.25}) as pruning:
        prompts.model(**prompts.inputs)
    handle.remove()
    real = prompts.inputs["attention_mask"].bool()
    is_visual = torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual)) & real
    behind = real & (is_visual.flip(1).cumsum(1).flip(1) == 0)
    stages = by_stage(pruning, calls)
    assert len(stages) == 2
    left = pruning.stats["before"]
    for groups, kept in zip(stages, pruning.kept_at.values(), strict=True):
        for samples, (given, chosen) in groups:
            assert given["k"] == chosen.indices.shape[1]
            for row, b in enumerate(samples):
                assert given["count"] == left[b] == int((given["key_indices"][row] >= 0).sum())
                whole = given["input_features"][row]
                if given["input_mask"] is not None:
                    whole = whole[given["input_mask"][row]]
                assert torch.equal(whole, embeds[0][b][is_visual[b]])
                text = given["input_text"][row][given["query_mask"][row]]
                assert torch.equal(text, embeds[0][b][behind[b]])
        left = (kept >= 0).sum(1).tolist()


def put_in_place(prompts: Prompts, pruning: Any, stages: list[list[tuple[list[int], Call]]]) -> list[Any]:
    """Hooks that put the rows of every stage where its kept tokens were, for a run that drops nothing."""
    columns = torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual))
    handles = []
    for (layer, kept), groups in zip(pruning.kept_at.items(), stages, strict=True):

        def hook(m: Any, args: Any, given: Any, kept: Tensor = kept, groups: Any = groups) -> Any:
            hidden = (args[0] if args else given["hidden_states"]).clone()
            for samples, (_, chosen) in groups:
                for row, b in enumerate(samples):
                    at = columns[b].nonzero().flatten()[kept[b][kept[b] >= 0]]
                    hidden[b, at] = chosen.merged[row].to(hidden)
            return ((hidden, *args[1:]), given) if args else (args, {**given, "hidden_states": hidden})

        layers = prompts.model.model.language_model.layers
        handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
    return handles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compact", [False, True])
def test_two_stages_and_32_decoded_tokens_equal_the_float64_path_with_their_rows(
    family: str, compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, calls = FAMILIES[family](), spied(monkeypatch)
    visual = (prompts.visual,) if isinstance(prompts.visual, int) else prompts.visual
    with prune_visual_tokens(prompts.model, "sparsevlm", {1: 0.5, 3: 0.25}, compact_cache=compact) as pruning:
        out = generate(prompts.model, prompts.inputs, 32, suppress_tokens=list(visual))
    stages = by_stage(pruning, calls)
    assert all(bool((chosen.sizes > 1).any()) for groups in stages for _, (_, chosen) in groups)  # something is merged
    handles = put_in_place(prompts, pruning, stages)  # copies of the model have them too
    try:
        drops, renumber = drops_of(prompts, pruning, 0, compact), not family.startswith("qwen")  # of mRoPE
        assert_decoded_like_the_oracle(prompts, drops, out, renumber=renumber, close=test_qwen.CLOSE)
    finally:
        for handle in handles:
            handle.remove()
    plain = oracle.logits(prompts, drops, renumber=renumber)[:, -1]
    assert not torch.allclose(out.logits[0].double(), plain, **test_qwen.CLOSE)  # the rows matter


def test_the_default_is_the_authors_schedule_and_one_number_its_last() -> None:
    """Layers 3, 7 and 16 of 32 are 1, 1 and 2 of 4, where the later share of one layer counts."""
    prompts = llava(3, ragged=True)
    for keep, counts in ((None, {1: 12, 2: 7}), (4, {1: 7, 2: 4})):
        with torch.no_grad(), prune_visual_tokens(prompts.model, "sparsevlm", keep) as pruning:
            prompts.model(**prompts.inputs)
        assert {layer: kept.shape[1] for layer, kept in pruning.kept_at.items()} == counts


def test_a_budget_that_only_the_device_knows_is_refused() -> None:
    prompts = llava(1)
    with pytest.raises(TypeError, match="sparsevlm takes no option 'rank_scale'; its options are recycle_ratio"):
        prune_visual_tokens(prompts.model, "sparsevlm", 9, rank_scale=13.5, recycle_ratio=None)
