"""What is read of the engine's towers, and how its crops are packed, on stand-ins for its models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenprune_kernels.integrations.vllm.images import Seen, chooser_of, tower_attention, tower_scores, watched
from tokenprune_kernels.integrations.vllm.packing import EnginePack
from tokenprune_kernels.integrations.vllm.setting import VARIABLE

HEADS, DIM, TOKENS = 2, 4, 10


class Attention(nn.Module):
    """The engine's attention of an encoder: query, key and value are [N, L, H * D]."""

    num_heads, scale = HEADS, DIM**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value


def model(class_token: bool, layer: Any = -2) -> Any:
    layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=Attention())) for _ in range(2)]
    embeddings = SimpleNamespace(class_embedding=0) if class_token else SimpleNamespace()
    body = SimpleNamespace(encoder=SimpleNamespace(layers=layers), embeddings=embeddings)
    strategy = "default" if class_token else "full"
    config = SimpleNamespace(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    return SimpleNamespace(vision_tower=SimpleNamespace(vision_model=body), config=config)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_saliency_is_that_of_the_last_layer_s_attention(class_token: bool) -> None:
    there = model(class_token)
    attention = tower_attention(there)
    assert attention is there.vision_tower.vision_model.encoder.layers[-1].self_attn.attn
    query, key = torch.randn(2, 3, TOKENS, HEADS * DIM, generator=torch.Generator().manual_seed(0))
    seen: Seen = []
    with watched(attention, seen):
        attention(query, key, key)
    attention(key, query, key)  # behind the block, nothing is seen
    assert len(seen) == 1
    products = torch.einsum("nihd,njhd->nhij", *(t.unflatten(-1, (HEADS, DIM)) for t in (query, key))) * DIM**-0.5
    weights = products.softmax(-1).mean(1)  # over heads
    expected = weights[:, 0, 1:] if class_token else weights.mean(1)
    torch.testing.assert_close(tower_scores(there, seen), expected, rtol=1e-5, atol=1e-6)


def test_a_tower_that_is_not_known_is_refused() -> None:
    several = model(True, layer=[-2, -1])
    with pytest.raises(NotImplementedError, match=r"one feature layer .* vision_feature_layer \[-2, -1\]"):
        tower_attention(several)
    with pytest.raises(NotImplementedError, match="the saliency needs a vision tower"):
        tower_attention(SimpleNamespace(vision_tower=nn.Identity(), config=several.config))


def test_a_saliency_whose_heads_are_on_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    monkeypatch.setenv(VARIABLE, "method=divprune,keep=3")
    assert not chooser_of(config).reads_saliency
    monkeypatch.setenv(VARIABLE, "method=scope,keep=3")
    with pytest.raises(NotImplementedError, match="which are on 2 ranks; run with --tensor-parallel-size 1"):
        chooser_of(config)
    config.parallel_config.tensor_parallel_size = 1
    assert chooser_of(config).reads_saliency


class Next:
    """Takes the newline from the model, as LLaVA-NeXT does."""

    config = SimpleNamespace()

    def _merge_image_patch_embeddings(self, image_size: Tensor, patch_embeddings: Tensor, *, strategy: str) -> Tensor:
        assert strategy == "spatial_unpad"
        return torch.cat([patch_embeddings.flatten(0, 1)[: int(image_size[0])], self.image_newline[None]])  # type: ignore[attr-defined]


class OneVision:
    """Takes it as an argument."""

    config = SimpleNamespace()

    def _merge_image_patch_embeddings(
        self, image_size: Tensor, patch_embeddings: Tensor, *, image_newline: Tensor | None = None, strategy: str
    ) -> Tensor:
        assert image_newline is not None
        given = SimpleNamespace(image_newline=image_newline)
        return Next._merge_image_patch_embeddings(given, image_size, patch_embeddings, strategy=strategy)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Next, OneVision])
def test_coordinates_are_packed_by_the_engine_s_own_code(kind: type) -> None:
    features = torch.arange(16.0).view(2, 4, 2)
    first, second = EnginePack([(2, 4), (2, 4)], [[3, 9], [7, 9]], {}).run(kind(), [features, features + 1], -1.0)
    assert torch.equal(first, torch.cat([features.flatten(0, 1)[:3], torch.tensor([[-1.0, -1.0]])]))
    assert torch.equal(second, torch.cat([features.flatten(0, 1)[:7] + 1, torch.tensor([[-1.0, -1.0]])]))
