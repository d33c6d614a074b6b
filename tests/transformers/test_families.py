"""A family of models is one description: what is served, refused and shown in the docs follows from it."""

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, StaticLayer

from testing import ROOT, family_table
from testing.pages import section
from tests.transformers.vlm.checks import LAYER, options_of
from tests.transformers.vlm.models import Prompts, llava
from tokenprune_kernels.integrations.transformers import METHODS, masks, prune_visual_tokens, registry
from tokenprune_kernels.integrations.transformers.families import Family
from tokenprune_kernels.integrations.transformers.layout import Layout, grid_patches, layout_of
from tokenprune_kernels.methods import get_method

FOLDER = Path(registry.__file__).parent


# --- a family of one's own --------------------------------------------------------------------------------------------


def served_as(prompts: Prompts, family: Family, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    monkeypatch.setattr(registry, "_FAMILIES", {})
    registry.register_family(family)
    monkeypatch.setattr(prompts.model.config, "model_type", family.model_types[0])
    return prompts


def row(core: Any, inputs: dict[str, Any], counts: list[int]) -> Layout:
    """All tokens of an image side by side."""
    assert set(inputs) == {"input_ids"}
    return layout_of([[grid_patches(1, count, 0)] for count in counts], max(counts))


TRIAL = Family("Trial", ("trial", "trial_next"), layout=row, grid="one row", saliency=None)


@pytest.mark.parametrize("method", METHODS)
def test_a_registered_family_is_pruned_by_its_description(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match=r"model_type 'trial'\) is not supported; supported are .*llava"):
        registry.family_of_type("trial", "TrialModel")
    prompts = served_as(llava(2, ragged=True), TRIAL, monkeypatch)
    assert registry.family_of(prompts.model) is registry.family_of_type("trial_next", "") is TRIAL
    with pytest.raises(NotImplementedError, match=r"supported are trial, trial_next$"):
        registry.family_of_type("llava", "LlavaModel")
    if "saliency" in get_method(method).uses:
        with pytest.raises(NotImplementedError, match=f"{method} has no saliency for Trial"):
            prune_visual_tokens(prompts.model, method, 9)
        return
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        prompts.model(**prompts.inputs)
    assert pruning.stats["after"] == [9, 9]
    boxes = pruning.boxes(sample=1)
    torch.testing.assert_close(boxes[:, 0] * 36, pruning.kept[1].float())
    assert torch.equal(boxes[:, [1, 3]], torch.tensor([[0.0, 1.0]]).expand(9, 2))


def refusals() -> dict[str, tuple[Family, str]]:
    family = registry.family_of(llava().model)
    return {
        "layer_types": (
            replace(family, layer_types=frozenset({"chunked_attention"})),
            "decoder layers must all have chunked attention, got full_attention",
        ),
        "encoders": (replace(family, encoders=("encode",)), "LlavaModel has no encode; this version of transformers"),
        "watched": (replace(family, watched={"pack": dict}), "LlavaModel has no pack; this version of transformers"),
        "deepstack": (replace(family, deepstack=True), "LlamaModel takes no deepstack_visual_embeds"),
    }


@pytest.mark.parametrize("field", refusals())
def test_what_a_family_promises_is_checked_on_entering(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, message = refusals()[field]
    prompts = served_as(llava(), family, monkeypatch)
    before = [sorted(vars(module)) for module in prompts.model.modules()]
    with pytest.raises(NotImplementedError, match=message):
        prune_visual_tokens(prompts.model, "divprune", 9).__enter__()
    assert [sorted(vars(module)) for module in prompts.model.modules()] == before


def test_layer_types_and_cache_layers_of_a_family_are_those_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    family = registry.family_of(llava().model)
    windows = replace(family, layer_types=family.layer_types | {"sliding_attention"}, cache_layers=(StaticLayer,))
    prompts = served_as(llava(), windows, monkeypatch)
    monkeypatch.setattr(prompts.model.config.text_config, "sliding_window", 8, raising=False)
    with prune_visual_tokens(prompts.model, "divprune", 9):
        cache = DynamicCache(config=llava().model.config.text_config)
        with pytest.raises(NotImplementedError, match="DynamicCache of StaticLayers, got DynamicLayer"):
            prompts.model(**prompts.inputs, past_key_values=cache)


def test_positions_of_an_mrope_family_are_not_renumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    family = registry.family_of(llava().model)
    prompts = served_as(llava(), replace(family, mrope=True), monkeypatch)
    with pytest.raises(ValueError, match=r"positions of LLaVA-1\.5 carry the image's geometry"):
        prune_visual_tokens(prompts.model, "adafv", 9, positions="renumber")
    with torch.no_grad(), prune_visual_tokens(prompts.model, "adafv", 9):
        default = prompts.model(**prompts.inputs).logits
    served_as(prompts, family, monkeypatch)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "adafv", 9, positions="original"):
        assert torch.equal(prompts.model(**prompts.inputs).logits, default)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "adafv", 9):
        assert not torch.equal(prompts.model(**prompts.inputs).logits, default)


def test_masks_of_the_prefill_and_of_decoding_are_made_from_the_familys(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(batch: int, head: int, query: Tensor, key: Tensor) -> Any:
        return key <= query

    made: list[Any] = []
    make = masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(make)  # the parameters differ between versions
    def noted(mask_function: Callable[..., Any], **more: Any) -> Any:
        made.append(mask_function)
        return make(mask_function=mask_function, **more)

    monkeypatch.setattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", {"sdpa": noted})
    family = replace(registry.family_of(llava().model), mask_function=visible)
    prompts = served_as(llava(), family, monkeypatch)
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        prompts.model.generate(**prompts.inputs, max_new_tokens=2, do_sample=False)
    assert made == [visible, visible]  # with padding the prefill takes what the model made, which has it


def test_a_type_that_is_not_served_names_what_to_load_or_what_is_missing() -> None:
    load = r"internvl_chat.\) is not supported: load the checkpoint .* -hf \(model_type internvl\); supported are"
    with pytest.raises(NotImplementedError, match=load):
        registry.family_of_type("internvl_chat", "InternVLChatModel")
    with pytest.raises(NotImplementedError, match="not supported: its images are seen through cross-attention"):
        registry.family_of_type("mllama", "MllamaForConditionalGeneration")
    named = {name for hint in registry.UNSERVED.values() for name in re.findall(r"model_type (\w+)", hint)}
    assert {"internvl", "llava"} <= named <= set(registry._FAMILIES)
    assert not set(registry.UNSERVED) & set(registry._FAMILIES)


# --- the table and the imports ----------------------------------------------------------------------------------------


def test_every_adapter_is_in_the_table_and_every_type_once() -> None:
    adapters = [path.stem for path in (FOLDER / "adapters").glob("*.py") if "\nFAMILIES = " in path.read_text()]
    assert {"llava", "qwen_vl"} <= set(adapters)
    described = [(t, f) for name in adapters for f in vars(registry)[name].FAMILIES for t in f.model_types]
    assert len(described) == len(registry._FAMILIES)
    assert all(registry._FAMILIES[t] is f for t, f in described)


@pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"),
    reason="the page is of versions whose caches hold the states of linear attention",
)
def test_the_table_of_the_docs_is_that_of_the_descriptions() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert section(page, "families") == family_table.families(), "run make readme"


def imports_of(path: Path) -> set[str]:
    """The modules of the folder, as `adapters.llava`, that a module names in an import, wherever it is."""
    package = path.relative_to(FOLDER).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and 1 <= node.level <= len(package) + 1:
            base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            for parts in ([*base, alias.name] for alias in node.names):
                parts = [part for part in parts if part]
                if not (FOLDER.joinpath(*parts).with_suffix(".py")).exists():
                    parts.pop()
                if parts:
                    found.add(".".join(parts))
    return found


def test_no_circle_of_imports_and_no_adapter_that_imports_another() -> None:
    modules = {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in FOLDER.rglob("*.py")}
    graph = {name: imports_of(path) for name, path in modules.items()}
    assert {"adapters.images", "families", "layout"} <= graph["adapters.llava"]
    assert "adapters.llava" in graph["registry"]
    order = list(TopologicalSorter(graph).static_order())  # a circle is a CycleError
    assert order.index("families") < order.index("registry") < order.index("hooks")
    adapters = {name for name in graph["registry"] if name.startswith("adapters.")}
    assert len(adapters) > 1
    for name in adapters:
        assert not graph[name] & adapters
