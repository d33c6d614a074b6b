"""Families around Qwen-VL under `prune_visual_tokens`: Qwen3-VL's mixture of experts, and GLM-V."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.transformers.vlm import models_mrope as mrope
from tests.transformers.vlm import models_qwen as qwen
from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import WITHOUT_MERGING, spy_on
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.runs_qwen import CLOSE, KEEP, exact, generate, greedy
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.transformers.registry import family_of

# Every method runs on these: a mixture of experts with DeepStack, and each decoder of GLM-V.
EACH = ("qwen3_vl_moe", "glm4v", "glm4v_moe", "glm_ocr")
ONE_ID = "glm4v"


def batch_of(name: str) -> Prompts:
    return mrope.batch(name, "images" if name in mrope.GLM else "both")


def check(prompts: Prompts, method: str, steps: int, compacted: bool = False, **more: Any) -> Any:
    """The logits of a prefill and of decoding are those of the exact path; returns the block's handle."""
    options = {**WITHOUT_MERGING.get(method, {}), "compact_cache": compacted, "seed": 1, **more}
    with prune_visual_tokens(prompts.model, method, KEEP, **options) as pruning:
        out, new = generate(prompts, steps)
    want = exact(prompts, pruning, new, compacted)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)
    assert torch.equal(new, greedy(want))
    return pruning


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_a_compacted_cache_of_a_mixture_of_experts(name: str) -> None:
    assert list(check(batch_of(name), "fastv", 3, compacted=True, layer=2).kept_at) == [2]


@pytest.mark.parametrize("method", ["adafv", "sts"])
def test_videos_of_a_mixture_of_experts_have_the_id_of_images(method: str) -> None:
    pruning = check(mrope.batch("glm4v_moe", "videos"), method, 3)
    assert pruning.stats["before"] == [24, 20]


def test_decoding_by_hand() -> None:
    """The model then adds rope_deltas to the length of a cache, which pruning has shortened."""
    prompts = batch_of("glm4v_moe")
    new = torch.tensor([[17, 40], [33, 58]])
    mask = prompts.inputs["attention_mask"]
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", KEEP) as pruning:
        out = prompts.model(**prompts.inputs, use_cache=True)
        steps = [out.logits[:, -1]]
        for at in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            given = {"input_ids": new[:, at : at + 1], "attention_mask": mask}
            out = prompts.model(**given, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    want = exact(prompts, pruning, torch.cat([new, new[:, :1]], 1))
    torch.testing.assert_close(torch.stack(steps, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("method", ["adafv", "coast"])
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v"])
def test_beam_search(name: str, method: str) -> None:
    """Beams of a sample share its kept tokens, and follow the logits of their own words."""
    # One image each: generate of transformers 5.24 hands GLM's beams the images of a prompt in another order.
    prompts, beams, steps = mrope.prompts(name, [[3, (1, 8, 12), 5], [2, (1, 8, 8), 4]]), 3, 4
    with prune_visual_tokens(prompts.model, method, KEEP) as pruning:
        out, new = generate(prompts, steps, num_beams=beams)
    ((layer, kept),) = [(n, each.unflatten(0, (2, beams))) for n, each in pruning.kept_at.items()]
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    start = prompts.inputs["input_ids"].shape[1]
    drop = oracle.Drop(layer, oracle.dropped_columns(prompts, kept[:, 0]))
    want = oracle.logits(prompts, [drop], new[:, :-1])[:, start - 1 :]
    rows = out.beam_indices[:, :steps]
    got = torch.stack([logits[rows[:, step]] for step, logits in enumerate(out.logits)], 1)
    torch.testing.assert_close(got.double(), want, **CLOSE)


# --- the layout -------------------------------------------------------------------------------------------------------


def layout_by_hand(grids: list[list[tuple[int, int]]]) -> list[list[list[int]]]:
    return [[[r, c, g] for g, (h, w) in enumerate(sample) for r in range(h) for c in range(w)] for sample in grids]


@pytest.mark.parametrize(
    ("kind", "grids"),
    [("images", [[(4, 6), (2, 4)], [(4, 4)]]), ("videos", [[(2, 4)] * 3, [(4, 2), (4, 2), (2, 2)]])],
)
def test_layout_of_images_and_of_frames_with_one_id(kind: str, grids: list[list[tuple[int, int]]]) -> None:
    prompts = mrope.batch(ONE_ID, kind)
    core, counts = prompts.model.model, [sum(h * w for h, w in sample) for sample in grids]
    shapes = {n: t for n, t in prompts.inputs.items() if not n.startswith("pixel")}
    positions, _ = core.get_rope_index(**shapes)
    # Positions alone are what generate leaves where it encodes the images beforehand.
    text_only = {n: t for n, t in shapes.items() if not n.endswith("grid_thw")} | {"position_ids": positions}
    for given in (shapes, text_only):
        layout = family_of(prompts.model).layout(core, given, counts)
        for b, want in enumerate(layout_by_hand(grids)):
            rows = torch.cat([layout.positions[b], layout.groups[b].unsqueeze(1)], 1)[: counts[b]]
            assert rows.tolist() == want
            assert layout.images[b, : counts[b]].tolist() == [group for _, _, group in want]


# --- the saliency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v", "glm_ocr"])
def test_saliency_is_the_attention_received(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = mrope.batch(name, kind)
    seen: list[Tensor] = []

    def adafv(**given: Any) -> Any:
        seen.append(given["saliency"])
        return methods.adafv(**given)

    spy_on(monkeypatch, "adafv", "adafv", adafv)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "adafv", 5):
        prompts.model(**prompts.inputs)
    chunks = last_weights(oracle.in_float64(prompts))
    want = torch.cat([weights.mean((0, 1)).view(-1, qwen.MERGE**2).mean(1) for weights in chunks])
    is_visual = torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual))
    counts = is_visual.sum(1).tolist()
    got = torch.cat([row[:count] for row, count in zip(seen[0], counts, strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0.0)


def last_weights(exact64: Prompts) -> list[Tensor]:
    """[H, patches, patches] of each image and frame, in the last block of the tower."""
    tower, chunks = exact64.model.model.visual, []
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **kw: Any) -> Any:
        weights = (q @ k.mT * scaling).softmax(-1)
        if m is tower.blocks[-1].attn:
            chunks.append(weights[0])
        return (weights @ v).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("last_weights", attend)
    tower.config._attn_implementation = "last_weights"
    with torch.no_grad():
        exact64.model(**exact64.inputs)
    return chunks
