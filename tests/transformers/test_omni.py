"""The thinkers of Qwen-Omni under `prune_visual_tokens`: tokens of sound stay, visual ones are pruned."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.transformers.vlm import models_omni as omni
from tests.transformers.vlm.checks import WITHOUT_MERGING
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.runs_crops import banned
from tests.transformers.vlm.runs_qwen import CLOSE, KEEP, exact, generate
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.transformers.registry import family_of, family_of_type


def check(prompts: Prompts, method: str, steps: int, keep: Any = KEEP, **more: Any) -> Any:
    """The logits of a prefill and of decoding are those of the exact path; returns the block's handle."""
    with prune_visual_tokens(prompts.model, method, keep, seed=1, **WITHOUT_MERGING.get(method, {})) as pruning:
        out, new = generate(prompts, steps, suppress_tokens=banned(prompts), **more)
    want = exact(prompts, pruning, new, **more)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)
    return pruning


@pytest.mark.parametrize("method", ["sts", "evs"])
@pytest.mark.parametrize("name", omni.NAMES)
def test_a_video_with_its_sound_between_its_frames(name: str, method: str) -> None:
    prompts = omni.sound_in_video(name)
    pruning = check(prompts, method, 3, keep=7, use_audio_in_video=True)
    assert pruning.stats["before"] == [12]
    core = prompts.model.model
    family, inputs = family_of(prompts.model), prompts.inputs
    positions, _ = core.get_rope_index(
        inputs["input_ids"], None, inputs["video_grid_thw"], inputs["attention_mask"], True,
        inputs["feature_attention_mask"].sum(1), inputs["video_second_per_grid"],
    )  # fmt: skip
    # From the grid, and from the positions, which are what generate leaves.
    for given in ({"video_grid_thw": inputs["video_grid_thw"]}, {"position_ids": positions}):
        layout = family.layout(core, {"input_ids": inputs["input_ids"], **given}, [12])
        assert layout.groups.tolist() == [[0] * 4 + [1] * 4 + [2] * 4]
        assert layout.positions[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] * 3


@pytest.mark.parametrize("whole", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_whole_model_is_refused_and_its_thinker_named(whole: str) -> None:
    with pytest.raises(NotImplementedError, match=r"pass model\.thinker"):
        family_of_type(whole, "QwenOmni")


def test_a_thinker_that_is_no_model_of_its_own_is_refused_on_entering() -> None:
    model = omni.model(omni.NAMES[0])
    core = model.model
    visual = core._modules.pop("visual", None)
    try:
        with pytest.raises(NotImplementedError, match="this version of transformers is not supported"):
            prune_visual_tokens(model, "divprune", 4)
    finally:
        if visual is not None:
            core._modules["visual"] = visual
