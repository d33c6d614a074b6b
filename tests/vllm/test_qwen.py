"""The Qwen classes in front of a stand-in for the engine's model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune_kernels.integrations.vllm.mrope import PrunedQwen
from tokenprune_kernels.integrations.vllm.setting import VARIABLE
from tokenprune_kernels.methods import divprune

IMAGE = 7


class EngineModel:
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=IMAGE)


class Model(PrunedQwen, EngineModel):
    pass


class WithDeepStack(Model):
    visual_dim = 8


def config(rate: float | None = None) -> Any:
    multimodal = SimpleNamespace(video_pruning_rate=rate)
    model = SimpleNamespace(architecture="QwenForConditionalGeneration", multimodal_config=multimodal)
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=1))


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(VARIABLE, "method=divprune,keep=5")
    return monkeypatch


def test_the_engine_hands_positions_on_and_drops_no_video() -> None:
    asked = config()
    for _ in range(2):  # weights may be loaded again
        Model(vllm_config=asked)
    rate = asked.model_config.multimodal_config.video_pruning_rate
    assert rate > 0
    assert 1 - rate == 1


def test_what_is_not_served_is_refused_by_name(setting: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        NotImplementedError, match=r"images of QwenForConditionalGeneration are pruned, .* leave out --v"
    ):
        Model(vllm_config=config(0.5))
    setting.setenv(VARIABLE, "method=visionzip,keep=5")
    with pytest.raises(NotImplementedError, match="visionzip reads the vision tower's attention, and that of QwenFor"):
        Model(vllm_config=config())


@pytest.mark.parametrize("kind", [Model, WithDeepStack])
def test_an_image_s_tokens_and_positions_from_the_encoder_to_the_prompt(kind: type) -> None:
    """Two images of 6 and 8 tokens, text in front of, between and behind them."""
    model = kind(vllm_config=config())
    further = 4 if kind is WithDeepStack else 0  # features of inner layers, kept with their token
    draw = torch.Generator().manual_seed(0)
    embeds = [torch.randn(count, 8 + further, generator=draw) for count in (6, 8)]
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])  # in patches: 2 x 3 and 4 x 2 tokens
    pruned = model._postprocess_image_embeds_evs(embeds, {"image_grid_thw": grids})
    kept = [divprune(each[None, :, :8], 5).indices[0] for each in embeds]

    ids = [1, 2, *[IMAGE] * 5, 3, *[IMAGE] * 5, 4]
    features = [
        SimpleNamespace(
            mm_position=SimpleNamespace(offset=offset, length=5), data={"image_grid_thw": SimpleNamespace(data=grid)}
        )
        for offset, grid in ((8, grids[1]), (2, grids[0]))
    ]
    first, delta = model.get_mrope_input_positions(ids, features)
    cleaned, positions, again = model.recompute_mrope_positions(ids, pruned, first, 0)
    for rows, each, indices in zip(cleaned, embeds, kept, strict=True):
        assert torch.equal(rows, each[indices])

    def on_grid(begin: int, indices: Tensor, width: int) -> Tensor:
        return begin + torch.stack([torch.zeros_like(indices), indices // width, indices % width])

    expected = torch.cat([
        torch.tensor([[0, 1]] * 3), on_grid(2, kept[0], 3), torch.tensor([[5]] * 3), on_grid(6, kept[1], 2),
        torch.tensor([[10]] * 3),
    ], 1)  # fmt: skip
    assert torch.equal(positions, expected)
    assert delta == again == 11 - len(ids)
