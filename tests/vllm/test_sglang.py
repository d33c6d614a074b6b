"""The plug-in for SGLang, against stand-ins with the engine's signatures. It has not run in the engine."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from testing import ROOT
from tests.methods.inputs import decided
from tests.vllm import engines
from tests.vllm.test_video import area, transcribed, video
from tokenprune_kernels.integrations.sglang import VARIABLE, register


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setenv(VARIABLE, "video=on")
    register.cache_clear()
    yield engines.sglang(monkeypatch)
    register.cache_clear()


def test_the_hook_replaces_the_function_where_the_engine_calls_it(engine):
    register()
    register()
    ((target, hook, kind),) = engine.hooks
    assert target == "sglang.srt.multimodal.evs.evs_module.compute_retention_mask"
    assert kind is engines.HookType.REPLACE
    size = (5, 4, 6)
    x, expected = decided(lambda seed: video(seed, size, torch.bfloat16), lambda x: transcribed("evs", x, size, 0.5))
    mask = hook(x, video_size_thw=size, spatial_merge_size=2, q=0.5)  # as EVS.evs_video does
    assert mask.nonzero().flatten().tolist() == expected
    assert len(mask) == 5 * area(size)


@pytest.mark.parametrize("where", ["core", "caller"])
def test_functions_that_are_not_known_register_nothing(where, engine, monkeypatch):
    monkeypatch.setattr(getattr(engine, where), "compute_retention_mask", lambda video_embeds, q: None)
    with pytest.raises(NotImplementedError, match=r"^sglang\.register: expected sglang\..*got .*\(video_embeds, q\)"):
        register()
    assert engine.hooks == []


def test_without_its_variable_it_does_nothing_and_a_wrong_value_is_named(engine, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    register()
    assert engine.hooks == []
    register.cache_clear()
    monkeypatch.setenv(VARIABLE, "images=on")
    with pytest.raises(ValueError, match="TOKENPRUNE_SGLANG: must be video=on or empty, got 'images=on'"):
        register()


def test_the_entry_point_names_it():
    page = ROOT / "pyproject.toml"
    if not page.exists():
        pytest.skip("no pyproject.toml beside these tests: they run from an installation")
    (value,) = re.findall(r'\[project\.entry-points\."sglang\.srt\.plugins"\]\ntokenprune = "(.*)"', page.read_text())
    assert value == f"{register.__module__}:{register.__name__}"
