"""The weights of the repository's model by the engine's names."""

from pathlib import Path

import pytest
import torch

from scripts.vllm_check.models import TINY, convert, engine_names

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def test_every_weight_is_there_once_and_the_tower_has_its_module(tmp_path: Path) -> None:
    theirs = safetensors.load_file(TINY / "model.safetensors")
    ours = safetensors.load_file(convert(TINY, tmp_path / "engine") / "model.safetensors")
    assert len(ours) == len(theirs)
    for name, weight in theirs.items():
        there = name.replace("vision_tower.", "vision_tower.vision_model.")
        assert torch.equal(ours[there], weight), name
    assert "vision_tower.vision_model.embeddings.class_embedding" in ours
    assert engine_names(ours).keys() == ours.keys()
    assert (tmp_path / "engine" / "config.json").is_file()
