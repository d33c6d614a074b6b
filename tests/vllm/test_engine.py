"""The engine's classes, found out by signature, on stand-ins: nothing here needs vLLM."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from testing import ROOT
from testing.process import search_path
from tokenprune_kernels.integrations.vllm import VARIABLE, register
from tokenprune_kernels.integrations.vllm.checks import check_method
from tokenprune_kernels.integrations.vllm.engine import ARCHITECTURES, guard
from tokenprune_kernels.integrations.vllm.placeholders import FewerPlaceholders
from tokenprune_kernels.integrations.vllm.runner import complete
from tokenprune_kernels.methods import get_method


@dataclass
class Update:
    """The engine's PromptReplacement."""

    modality: str
    replacement: Any


class Items:
    def __init__(self, embeddings: bool) -> None:
        self.embeddings = embeddings

    def get_passthrough_data(self) -> dict[str, Any]:
        return {"image_embeds": 0} if self.embeddings else {}


class EngineProcessor:
    updates: Sequence[Update] = (Update("image", lambda index: [9] * (10 + index)), Update("video", [8] * 10))

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Update]:
        return self.updates

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        return {"image": ["a", "b"], "video": ["a"]}


class Processor(FewerPlaceholders, EngineProcessor):
    pass


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(VARIABLE, "method=divprune,keep=0.5")
    return monkeypatch


def test_images_get_as_many_placeholders_as_tokens_are_kept(setting: pytest.MonkeyPatch) -> None:
    image, video = Processor()._get_prompt_updates({"image": Items(False)}, {}, {})
    assert [image.replacement(index) for index in (0, 4)] == [[9] * 5, [9] * 7]
    assert video.replacement == [8] * 10
    setting.setenv(VARIABLE, "method=divprune,keep=11")
    image, _ = Processor()._get_prompt_updates({}, {}, {})
    assert [len(image.replacement(index)) for index in (0, 4)] == [10, 11]


@pytest.mark.usefixtures("setting")
def test_what_cannot_be_shortened_is_refused() -> None:
    with pytest.raises(ValueError, match="a request must bring images, got image_embeds"):
        Processor()._get_prompt_updates({"image": Items(True)}, {}, {})

    class WithBreaks(Processor):
        updates = (Update("image", [9, 9, 7, 9, 9, 7]),)

    (image,) = WithBreaks()._get_prompt_updates({}, {}, {})
    with pytest.raises(NotImplementedError, match=r"one repeated token in the prompt, got \[9, 9, 7"):
        image.replacement(0)


def test_caches_of_other_settings_and_of_the_engine_without_one_are_not_read(setting: pytest.MonkeyPatch) -> None:
    half = Processor()._get_mm_hashes(None)
    assert half == Processor()._get_mm_hashes(None)
    assert half["video"] == ["a"]
    assert len({*half["image"], "a", "b"}) == 4
    setting.setenv(VARIABLE, "method=divprune,keep=0.25")
    assert not set(half["image"]) & set(Processor()._get_mm_hashes(None)["image"])


class Known:
    def method(self, a: int, *, b: int, c: int = 0, **others: Any) -> None: ...


def test_a_method_is_known_by_its_signature() -> None:
    check_method(Known, "method", "a", "b")
    check_method(Known, "method", "a", "b", "c")
    for expected in (("a",), ("a", "b", "d")):
        with pytest.raises(NotImplementedError, match=r"vLLM's Known.method takes \(a, b, c, others\), not \("):
            check_method(Known, "method", *expected)
    with pytest.raises(NotImplementedError, match="vLLM's Known has no method other; the plug-in does not know this"):
        check_method(Known, "other")


def registry(processor: Any) -> type:
    class MultiModalRegistry:
        def create_processor(self, model_config: Any, *, tokenizer: Any = None) -> Any:
            return processor

    return MultiModalRegistry


def test_a_model_whose_images_would_stay_is_refused_by_name() -> None:
    ours, theirs = registry(Processor()), registry(EngineProcessor())
    config = SimpleNamespace(architecture="NewForConditionalGeneration")
    for each in (ours, theirs):
        guard(each)
        once = each.create_processor  # type: ignore[attr-defined]
        guard(each)
        assert each.create_processor is once  # type: ignore[attr-defined]
    assert isinstance(ours().create_processor(config, tokenizer=None), Processor)
    with pytest.raises(
        NotImplementedError, match=r"images of NewForConditionalGeneration cannot be pruned; those of L"
    ):
        theirs().create_processor(config)


def test_a_runner_that_forgets_to_ask_for_positions_is_completed() -> None:
    class Runner:
        def __init__(self, able: bool, rate: float) -> None:
            self.is_multimodal_pruning_enabled = False
            config = SimpleNamespace(is_multimodal_pruning_enabled=lambda: rate > 0)
            self.model_config = SimpleNamespace(multimodal_config=config)
            self.model = SimpleNamespace(supports_multimodal_pruning=able)

        def load_model(self, load_dummy_weights: bool = False) -> None:
            self.loaded = True

        def get_model(self) -> Any:
            return self.model

    complete(Runner)
    once = Runner.load_model
    complete(Runner)
    assert Runner.load_model is once
    for able, rate in ((True, 0.0), (False, 1.0), (True, 1.0)):
        runner = Runner(able, rate)
        runner.load_model()
        assert runner.loaded
        assert runner.is_multimodal_pruning_enabled == (able and rate > 0)

    class Newer(Runner):
        def load_model(self, load_dummy_weights: bool = False) -> None:
            self.is_multimodal_pruning_enabled = True

    as_it_was = Newer.load_model
    complete(Newer)
    assert Newer.load_model is as_it_was


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A stand-in for vLLM in sys.modules; what is registered with it."""
    registered: dict[str, str] = {}

    class ModelRegistry:
        def register_model(self, model_arch: str, model_cls: str) -> None:
            registered[model_arch] = model_cls

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": ModelRegistry()},
        "vllm.multimodal": {},
        "vllm.multimodal.registry": {"MultiModalRegistry": registry(Processor())},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def test_every_model_is_registered_by_a_name_that_is_imported_later(
    engine: dict[str, str], setting: pytest.MonkeyPatch
) -> None:
    register()
    register()
    assert engine.keys() == ARCHITECTURES.keys()
    for architecture, named in engine.items():
        module, _, name = named.partition(":")
        assert name == architecture
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert module not in sys.modules


def test_wrong_settings_and_unknown_versions_leave_the_engine_as_it_was(
    engine: dict[str, str], setting: pytest.MonkeyPatch
) -> None:
    setting.setenv(VARIABLE, "method=fastv,keep=3")
    with pytest.raises(ValueError, match="method must choose by the image alone"):
        register()
    setting.setenv(VARIABLE, "method=divprune,keep=3")

    class Other:
        def create_processor(self, config: Any, tokenizer: Any) -> None: ...

    as_it_was = Other.create_processor
    setting.setattr(sys.modules["vllm.multimodal.registry"], "MultiModalRegistry", Other)
    with pytest.raises(NotImplementedError, match=r"Other.create_processor takes \(config, tokenizer\), not"):
        register()
    setting.delattr(sys.modules["vllm.multimodal.registry"], "MultiModalRegistry")
    with pytest.raises(NotImplementedError, match="vLLM lacks what models are registered with"):
        register()
    assert engine == {}
    assert Other.create_processor is as_it_was


def test_without_a_setting_nothing_happens(engine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    monkeypatch.setenv(VARIABLE, " ")
    register()
    assert engine == {}


def test_the_entry_point_imports_nothing_of_the_engine() -> None:
    program = (
        "import sys; from tokenprune_kernels.integrations.vllm import register; register(); "
        "print([name for name in sys.modules if name.partition('.')[0] in ('vllm', 'transformers')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": search_path(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    section = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert section.startswith('tokenprune = "tokenprune_kernels.integrations.vllm:register"\n')


def test_what_is_optional_to_a_method_is_known_by_name() -> None:
    assert get_method("cdpruner").stages[0].optional == ("text_embeddings", "text_mask")
