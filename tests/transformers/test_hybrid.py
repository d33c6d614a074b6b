"""Qwen3.5 and LFM2-VL under `prune_visual_tokens`: a state has seen a token, so dropped ones never come to a layer."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

pytest.importorskip("transformers")

from tests.transformers.vlm import models_hybrid as hybrid
from tests.transformers.vlm import models_merged, oracle, oracle_removing
from tests.transformers.vlm.checks import WITHOUT_MERGING
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.runs_qwen import CLOSE, KEEP, generate, greedy
from tests.transformers.vlm.runs_qwen import exact as exact_by
from tokenprune_kernels.integrations.transformers import prune_visual_tokens, registry
from tokenprune_kernels.integrations.transformers.pruning import stages_of
from tokenprune_kernels.methods import get_method


@functools.cache
def batch_of(name: str) -> Prompts:
    if name != "lfm2_vl":
        return hybrid.batch(name)
    try:
        return models_merged.lfm2_vl()
    except ImportError as lacking:
        pytest.skip(f"transformers {transformers.__version__}: {lacking}")


def exact(prompts: Prompts, pruning: Any, new: Tensor, compacted: bool = False, **more: Any) -> Tensor:
    return exact_by(prompts, pruning, new, compacted, path=oracle_removing.logits, **more)


def check(name: str, method: Any, steps: int, keep: Any = KEEP, **more: Any) -> Any:
    """The logits of a prefill and of decoding are those of the exact path; returns the block's handle."""
    prompts = batch_of(name)
    options = {**WITHOUT_MERGING.get(method, {}), **more} if isinstance(method, str) else more
    with prune_visual_tokens(prompts.model, method, keep, seed=1, **options) as pruning:
        out, new = generate(prompts, steps)
    want = exact(prompts, pruning, new, more.get("compact_cache", False))
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)
    assert torch.equal(new, greedy(want))
    return pruning


def longest(features: Tensor, present: Tensor, k: int) -> Tensor:
    """A method that reads no attention, and so can choose in front of any layer."""
    return features.norm(dim=-1).masked_fill(~present, -torch.inf).topk(k).indices


# --- the path itself --------------------------------------------------------------------------------------------------


def test_a_mask_would_not_hide_a_token_from_a_state() -> None:
    """What the models with attention alone are compared with differs here by far more than rounding."""
    prompts = hybrid.batch("qwen3_5")
    drop = oracle.Drop(0, oracle.dropped_columns(prompts, torch.tensor([[0, 5], [1, 3]])))
    masked, removed = (path.logits(prompts, [drop])[:, -1] for path in (oracle, oracle_removing))
    assert (masked - removed).abs().max() > 0.1


# --- logits -----------------------------------------------------------------------------------------------------------


def test_padding_stays_out_of_states() -> None:
    """Eager attention gives rows of padding the mean of all values: only a mask keeps them out of the layer behind."""
    model = hybrid.batch("qwen3_5").model
    model.set_attn_implementation("eager")
    try:
        assert check("qwen3_5", "divprune", 2).stats["after"] == [18, 6]
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("qwen3_5", 1), ("qwen3_5", 3), ("qwen3_5_moe", 2), ("qwen3_5_moe", 4), ("lfm2_vl", 1), ("lfm2_vl", 2)],
)
def test_in_front_of_any_layer(name: str, layer: int, compact: bool) -> None:
    """A compacted cache lacks the dropped tokens in layers with keys; states in front of the pruning have seen them."""
    assert list(check(name, longest, 3, layer=layer, compact_cache=compact).kept_at) == [layer]


@pytest.mark.parametrize("compact", [False, True])
def test_a_schedule(compact: bool) -> None:
    pruning = check("qwen3_5", longest, 3, {1: 0.6, 2: 0.4, 3: 0.2}, compact_cache=compact)
    assert {layer: (kept >= 0).sum(1).tolist() for layer, kept in pruning.kept_at.items()} == {
        1: [26, 9], 2: [17, 6], 3: [8, 3],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [("qwen3_5", "coast"), ("qwen3_5_moe", "fastv"), ("qwen3_5", "divprune"), ("lfm2_vl", "coast")],
)
def test_several_new_tokens_at_once_and_then_one(name: str, method: str) -> None:
    """As in a further turn: the state and the convolution go on from where they are."""
    prompts = batch_of(name)
    new = torch.tensor([[17, 40, 22, 9], [64, 33, 58, 12]])
    mask = pad(prompts.inputs["attention_mask"], (0, 4), value=1)
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, KEEP) as pruning:
        cache = prompts.model(**prompts.inputs, use_cache=True).past_key_values
        given = {"attention_mask": mask[:, :-1], "past_key_values": cache}
        turn = prompts.model(input_ids=new[:, :3], **given).logits
        last = prompts.model(input_ids=new[:, 3:], attention_mask=mask, past_key_values=cache).logits
    want = exact(prompts, pruning, pad(new, (0, 1)))[:, 1:]
    torch.testing.assert_close(torch.cat([turn, last], 1).double(), want, **CLOSE)


def test_beam_search() -> None:
    prompts, beams, steps = hybrid.batch("qwen3_5"), 3, 4
    with prune_visual_tokens(prompts.model, "coast", KEEP) as pruning:
        out, new = generate(prompts, steps, num_beams=beams)
    (kept,) = [kept.unflatten(0, (2, beams)) for kept in pruning.kept_at.values()]
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    drop = oracle.Drop(2, oracle.dropped_columns(prompts, kept[:, 0]))
    start = prompts.inputs["input_ids"].shape[1]
    want = oracle_removing.logits(prompts, [drop], new[:, :-1])[:, start - 1 :]
    rows = out.beam_indices[:, :steps]
    got = torch.stack([logits[rows[:, step]] for step, logits in enumerate(out.logits)], 1)
    torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize(
    ("method", "where"), [("coast", [4]), ("sts", [0, 4]), ("pyramiddrop", [11, 19, 27]), ("sparsevlm", [4, 8, 16])]
)
def test_default_layers_of_a_published_model(method: str, where: list[int]) -> None:
    """Every fourth of 32 layers has full attention."""
    layers = [SimpleNamespace(**{"self_attn" if index % 4 == 3 else "linear_attn": None}) for index in range(32)]
    planned = stages_of(
        get_method(method), None, None, registry.family_of_type("qwen3_5", ""), SimpleNamespace(layers=layers)
    )
    assert [stage.layer for stage in planned] == where


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "more", "message"),
    [
        ("qwen3_5", "fastv", {"layer": 1}, "fastv reads the attention of layer 0, .* in front of layer 2$"),
        ("qwen3_5_moe", "coast", {"layer": 3}, "coast reads the attention of layer 2, .* in front of layer 4$"),
        ("qwen3_5", "pyramiddrop", {"layer": 2}, "pyramiddrop reads the projections of layer 2, .* layer 1, 3$"),
        ("qwen3_5", "visionzip", {"calibrate": True}, "linear attention or convolutions have none"),
    ],
)
def test_what_linear_attention_does_not_define_is_refused(
    name: str, method: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        prune_visual_tokens(hybrid.batch(name).model, method, KEEP, **more)


def test_versions_whose_caches_lack_linear_attention_are_refused_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid.model("qwen3_5")
    family = registry.family_of(model)
    assert hybrid.served() == ("linear_attention" in family.layer_types)
    lacking = replace(family, layer_types=frozenset({"full_attention"}))
    monkeypatch.setitem(registry._FAMILIES, "qwen3_5", lacking)
    with pytest.raises(NotImplementedError, match=r"must all have full attention, got .*linear"):
        prune_visual_tokens(model, "divprune", KEEP).__enter__()
