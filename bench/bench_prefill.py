"""Prefill of a whole vision-language model, with and without pruning, and what selection and compaction cost of it.

A LLaVA with random weights and a decoder of 12 layers of width 768. Its vision tower is kept tiny: the prefill that
pruning shortens is the decoder's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens

IMAGE = 900
KEEP = 0.222
TEXT_BEFORE, TEXT_AFTER = 35, 30


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        vocab_size=1000, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()


def prompt(images: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(images)
    before, after = (torch.randint(3, 800, (n,), generator=draw) for n in (TEXT_BEFORE, TEXT_AFTER))
    ids = torch.cat([before, torch.full((576 * images,), IMAGE), after]).unsqueeze(0)
    pixels = torch.randn(images, 3, 336, 336, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_prefill(race: Callable[..., Any], benchmark: Any, model: Any, method: str, images: int) -> None:
    inputs = prompt(images)
    costs: list[float] = []

    @torch.inference_mode()
    def unpruned() -> torch.Tensor:
        return model(**inputs, logits_to_keep=1).logits

    @torch.inference_mode()
    def pruned(keep: float = KEEP) -> torch.Tensor:
        with prune_visual_tokens(model, method, keep=keep, seed=0) as pruning:
            logits = model(**inputs, logits_to_keep=1).logits
        stats = pruning.stats
        costs.append((stats["select_ms"] + stats["compact_ms"]) / 1e3)
        return logits

    def check(results: dict[str, Any]) -> None:
        """With every token kept the model is the unpruned one; with some dropped the logits are others."""
        assert torch.equal(pruned(1.0), results["unpruned prefill"])
        assert results["ours"].isfinite().all()
        assert not torch.equal(results["ours"], results["unpruned prefill"])
        costs.clear()

    best = race(
        f"prefill, 12 x 768, {method}, {576 * images} -> {KEEP:.1%}",
        {"ours": pruned, "unpruned prefill": unpruned},
        check=check,
        target=("unpruned prefill", 2.15) if images == 5 else None,
        seconds=6.0,
    )
    # As a row of its own: selection and compaction, in parts of the unpruned prefill.
    share = min(costs) / best["unpruned prefill"]
    benchmark.extra_info["selection_share"] = share
    benchmark.extra_info["note"] = f"selection and compaction: {share:.2%} of the unpruned prefill"
