"""vLLM's functions for videos, served by ours: what they keep, and how they get into the engine. Without vLLM."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.methods import transcriptions
from tests.methods.inputs import DTYPES, decided, over_dtypes
from tests.vllm import engines
from tokenprune_kernels.integrations.vllm.video import register_video, unregister_video

SIZES = [(1, 4, 6), (5, 4, 6), (3, 7, 5)]  # frames, rows and columns; 2 x 2 of them are a token, the odd last ones none
RATES = (0.1, 0.3, 0.5, 0.7, 0.95)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """vLLM's modules, with ours registered."""
    found = engines.vllm(monkeypatch)
    register_video()
    yield found
    unregister_video()


def area(size: tuple[int, int, int]) -> int:
    return (size[1] // 2) * (size[2] // 2)


def video(seed: int, size: tuple[int, int, int], dtype: torch.dtype, channels: int = 24) -> Tensor:
    """A slow video: rounded to bfloat16, many of its cosines and distances are equal."""
    draw = torch.Generator().manual_seed(seed)
    step = 0.3 * torch.randn(size[0], area(size), channels, generator=draw)
    scene = torch.randn(1, area(size), channels, generator=draw)
    return (scene + step.cumsum(0)).flatten(0, 1).to(dtype)


def transcribed(method: str, x: Tensor, size: tuple[int, int, int], q: float) -> list[int]:
    """What the method's steps keep in float64."""
    features, frames = x.double().numpy(), [area(size)] * size[0]
    if method == "evs":
        return transcriptions.evs(features, frames, engines.evs_count(area(size), size[0], q))["indices"]
    return transcriptions.vidcom2(features, frames, engines.vidcom2_count(area(size), size[0], q), 1 - q)["indices"]


# --- what is kept -------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("q", RATES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_the_mask_keeps_what_the_steps_keep_in_float64(method, size, q, dtype, engine):
    x, expected = decided(lambda seed: video(seed, size, dtype), lambda x: transcribed(method, x, size, q))
    mask = getattr(engine, method).compute_retention_mask(x, video_size_thw=size, spatial_merge_size=2, q=q)
    assert mask.dtype == torch.bool
    assert mask.shape == (size[0] * area(size),)
    assert mask.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_changes_are_kept_from_the_first_frame_on(dtype, engine):
    """As the engine's stable sort does: rows of one hot channel have exact cosines in every dtype."""
    x = torch.eye(8, dtype=dtype)[torch.tensor([0, 1, 2, 0, 1, 3, 0, 4, 3, 5, 4, 3])]  # 4 frames of 3 tokens
    mask = engine.evs.compute_retention_mask(x, (4, 1, 3), 1, 0.5)
    assert mask.nonzero().flatten().tolist() == [0, 1, 2, 5, 7, 9]
    mask = engine.evs.compute_retention_mask(x, (4, 1, 3), 1, 0.25)
    assert mask.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_the_mask_has_the_length_of_the_prompt_whatever_the_features(method, bad, engine):
    """The prompt was made for so many tokens; another number ends the engine."""
    module = getattr(engine, method)
    for share in (0.02, 0.5, 1.0):
        x = video(0, (5, 4, 6), torch.float32)
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share] = bad
        for q in RATES:
            mask = module.compute_retention_mask(x, (5, 4, 6), 2, q)
            assert int(mask.sum()) == module.compute_retained_tokens_count(6, 5, q)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_the_number_is_the_engines(method, monkeypatch):
    """Not a formula of ours, which could differ from that of the prompt."""
    found = engines.vllm(monkeypatch)

    def other(tokens_per_frame: int, num_frames: int, q: float) -> int:
        return tokens_per_frame + num_frames

    monkeypatch.setattr(getattr(found, method), "compute_retained_tokens_count", other)
    register_video()
    try:
        size = (5, 4, 6)
        mask = getattr(found, method).compute_retention_mask(video(0, size, torch.float32), size, 2, 0.5)
    finally:
        unregister_video()
    assert int(mask.sum()) == 6 + 5


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_nothing_is_read_on_the_host(method, engine):
    """A fake tensor has no values: a single `.item()` of its results raises."""
    with FakeTensorMode():
        x = torch.empty(5 * 6, 24, dtype=torch.bfloat16)
        mask = getattr(engine, method).compute_retention_mask(x, (5, 4, 6), 2, 0.5)
    assert (mask.shape, mask.dtype) == ((30,), torch.bool)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_a_size_may_be_a_tensor_and_a_video_empty(method, engine):
    function = getattr(engine, method).compute_retention_mask
    x = video(0, (5, 4, 6), torch.float32)
    assert torch.equal(function(x, torch.tensor([5, 4, 6]), 2, 0.5), function(x, (5, 4, 6), 2, 0.5))
    assert function(x[:0], (0, 4, 6), 2, 0.5).shape == (0,)
    with pytest.raises(RuntimeError, match="shape"):
        function(x, (6, 4, 6), 2, 0.5)


# --- how they get there -------------------------------------------------------------------------------------------


def bindings(engine: SimpleNamespace) -> list[Any]:
    model = engine.model
    own = [engine.evs.compute_retention_mask, engine.vidcom2.compute_retention_mask]
    return [*own, model.compute_retention_mask, model.vidcom2_compute_retention_mask]


def test_modules_that_have_loaded_and_those_to_come_call_ours_until_it_is_undone(monkeypatch):
    engine = engines.vllm(monkeypatch)
    evs, vidcom2, *_ = before = bindings(engine)
    register_video()
    ours = bindings(engine)
    assert not set(ours) & set(before)
    assert (ours[0], ours[1]) == (ours[2], ours[3])
    register_video()
    assert bindings(engine) == ours, "registered twice"
    late = engines.module(monkeypatch, "vllm.model_executor.models.late", mask=engine.evs.compute_retention_mask)
    unregister_video()
    assert bindings(engine) == [evs, vidcom2, evs, vidcom2]
    assert late.mask is evs
    unregister_video()
    assert bindings(engine) == before, "undone twice"


def renamed(embeds: Tensor, video_size_thw: Any, spatial_merge_size: int, q: float) -> Tensor:
    raise NotImplementedError


def with_one_more(
    video_embeds: Tensor, video_size_thw: Any, spatial_merge_size: int, q: float, *, seed: int = 0
) -> Tensor:
    raise NotImplementedError


def with_default(video_embeds: Tensor, video_size_thw: Any, spatial_merge_size: int, q: float = 0.5) -> Tensor:
    raise NotImplementedError


def other_count(tokens: int, q: float) -> int:
    raise NotImplementedError


MASK, COUNT = "compute_retention_mask", "compute_retained_tokens_count"


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize(
    ("name", "function", "got"),
    [
        (MASK, renamed, r"got compute_retention_mask\(embeds, video_size_thw, spatial_merge_size, q\)"),
        (MASK, with_one_more, "q, seed=0"),
        (MASK, with_default, "q=0.5"),
        (MASK, 3, "got TypeError: 3 is not a callable object"),
        (MASK, None, "got AttributeError: module .* has no attribute 'compute_retention_mask'"),
        (COUNT, other_count, r"got compute_retained_tokens_count\(tokens, q\)"),
    ],
)
def test_functions_that_are_not_known_leave_everything_as_it_was(method, name, function, got, monkeypatch):
    engine = engines.vllm(monkeypatch)
    if function is None:
        monkeypatch.delattr(getattr(engine, method), name)
    else:
        monkeypatch.setattr(getattr(engine, method), name, function)
    others = [m for m in (engine.evs, engine.vidcom2) if m is not getattr(engine, method)]
    before = [vars(m).copy() for m in (*others, engine.model)]
    wanted = rf"^register_video: expected vllm\.multimodal\.video_prune\.{method}\.{name}\("
    with pytest.raises(NotImplementedError, match=f"{wanted}.*{got}.*; nothing was changed$"):
        register_video()
    assert [vars(m) for m in (*others, engine.model)] == before
    unregister_video()
    assert [vars(m) for m in (*others, engine.model)] == before, "there was nothing to undo"


def test_a_missing_module_is_named(monkeypatch):
    engine = engines.vllm(monkeypatch)
    before = vars(engine.evs).copy()
    monkeypatch.setitem(sys.modules, f"{engines.VLLM}.vidcom2", None)
    with pytest.raises(NotImplementedError, match=r"expected vllm\.multimodal\.video_prune\.vidcom2\..*ModuleNotFound"):
        register_video()
    assert vars(engine.evs) == before


def test_nothing_of_vllm_is_imported_before_it_is_asked_for():
    """An engine loads plug-ins in every process, before its own modules."""
    import subprocess

    code = "import sys, tokenprune_kernels.integrations.vllm.video, tokenprune_kernels.integrations.sglang\n"
    code += "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'sglang', 'transformers')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
