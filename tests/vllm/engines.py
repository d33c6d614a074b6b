"""Stand-ins for the modules of vLLM 0.32 and SGLang 0.5.23 that prune videos, with the signatures of the real ones."""

import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VLLM = "vllm.multimodal.video_prune"
SGLANG = "sglang.srt"


def evs_count(tokens_per_frame: int, num_frames: int, q: float) -> int:
    return max(tokens_per_frame, int(tokens_per_frame * num_frames * (1 - q)))


def vidcom2_count(tokens_per_frame: int, num_frames: int, q: float) -> int:
    total = tokens_per_frame * num_frames
    return max(num_frames, min(int(total * (1.0 - q)), total))


def _mask() -> Callable[..., Any]:
    """Each module of an engine has a function of its own."""

    def compute_retention_mask(
        video_embeds: torch.Tensor,
        video_size_thw: torch.LongTensor | tuple[int, int, int],
        spatial_merge_size: int,
        q: float,
    ) -> torch.Tensor:
        raise NotImplementedError("the engine's own")

    return compute_retention_mask


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module that can be imported until the test ends, and the packages that it is in."""
    packages = name.split(".")[:-1]
    for i in range(len(packages)):
        package = ".".join(packages[: i + 1])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its two methods, and a model that has imported both of their functions."""
    evs, vidcom2 = (
        module(monkeypatch, f"{VLLM}.{name}", compute_retention_mask=_mask(), compute_retained_tokens_count=count)
        for name, count in (("evs", evs_count), ("vidcom2", vidcom2_count))
    )
    model = module(
        monkeypatch,
        "vllm.model_executor.models.qwen3_vl",
        compute_retention_mask=evs.compute_retention_mask,
        vidcom2_compute_retention_mask=vidcom2.compute_retention_mask,
    )
    return SimpleNamespace(evs=evs, vidcom2=vidcom2, model=model)


class HookType(enum.Enum):
    AFTER = "after"
    REPLACE = "replace"


def sglang(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its EVS, and the registry of hooks; `hooks` is what was registered."""
    hooks: list[tuple[Any, ...]] = []

    class HookRegistry:
        @classmethod
        def register(
            cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: object = None
        ) -> None:
            hooks.append((target, hook, hook_type))

    own = _mask()
    evs = f"{SGLANG}.multimodal.evs"
    core = module(monkeypatch, f"{evs}.evs_core", compute_retention_mask=own, compute_retained_tokens_count=evs_count)
    caller = module(monkeypatch, f"{evs}.evs_module", compute_retention_mask=own)
    module(monkeypatch, f"{SGLANG}.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
    return SimpleNamespace(core=core, caller=caller, hooks=hooks)
