"""prune_visual_tokens on models that see images in crops, tiles or frames, or in their own size: LLaVA-NeXT,
LLaVA-OneVision, InternVL3, LLaVA with Pixtral."""

import copy
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import IN_MODEL, spy_on
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.models_crops import RAGGED
from tests.transformers.vlm.runs_crops import (
    BATCHES,
    FAMILIES,
    SALIENCY,
    VIDEOS,
    beams_are_repeated_after_encoding,
    generate,
    layout_in,
    onevision_video_saliency,
    prompts_of,
    pruned,
)
from tokenprune_kernels import methods

CASES = [*itertools.product(FAMILIES, BATCHES), *((family, "video") for family in VIDEOS)]


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_compacted_cache(family: str) -> None:
    prompts = prompts_of(family, "ragged")
    with pruned(prompts, "coast", 0.3, compact_cache=True) as pruning:
        new, logits = generate(prompts, 5)
    drop = oracle.Drop(2, oracle.dropped_columns(prompts, pruning.kept), everywhere_for_new_rows=True)
    expected = oracle.logits(prompts, [drop], new[:, :-1])[:, -5:]
    assert (logits - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("family", "batch"), CASES)
def test_the_vision_tower_runs_as_often_as_without_pruning(family: str, batch: str) -> None:
    prompts = prompts_of(family, batch)
    runs = []
    handle = prompts.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        with pruned(prompts, "adafv", 0.4):
            generate(prompts, 3)
    finally:
        handle.remove()
    assert len(runs) == (2 if (family, batch) == ("llava_onevision", "video") else 1)  # images, videos


@pytest.mark.parametrize("method", ["adafv", "adaptprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_keep_what_their_sample_keeps(family: str, method: str) -> None:
    prompts = prompts_of(family, "several")
    if not beams_are_repeated_after_encoding(prompts):
        # Older versions repeat crop by crop, which mixes the images of a sample up even without pruning.
        prompts = FAMILIES[family]([[(16, 16)], [(16, 16)]])
        if family != "internvl":
            prompts = FAMILIES[family](RAGGED)
    with pruned(prompts, method, 0.4) as pruning:
        generate(prompts, 2)
        alone = pruning.kept
        with torch.no_grad():
            prompts.model.generate(**prompts.inputs, max_new_tokens=2, min_new_tokens=2, num_beams=3, do_sample=False)
    assert torch.equal(pruning.kept, alone.repeat_interleave(3, 0))


# --- what is selected ---------------------------------------------------------------------------------------------


def eager_run(prompts: Prompts, layer: int, columns: Tensor | None = None) -> dict[str, Tensor]:
    """What a run with eager attention has in front of a decoder layer: unpruned, or of these columns [L'] alone."""
    embeddings = None if columns is None else eager_run(prompts, 0)["hidden"][:, columns]
    model = copy.deepcopy(prompts.model)
    model.set_attn_implementation("eager")
    layers = model.model.language_model.layers
    seen: dict[str, Any] = {}

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    def rotary(module: Any, args: Any, kwargs: Any) -> None:
        seen["rotary"] = kwargs["position_embeddings"]

    layers[layer].register_forward_pre_hook(entering, with_kwargs=True)
    if layer > 0:
        layers[layer - 1].register_forward_pre_hook(rotary, with_kwargs=True)
        for name in ("q_proj", "k_proj"):
            module = getattr(layers[layer - 1].self_attn, name)
            module.register_forward_hook(lambda m, a, out, to=name: seen.__setitem__(to, out))
    with torch.no_grad():
        if columns is None:
            model(**prompts.inputs)
        else:
            model.model.language_model(inputs_embeds=embeddings, position_ids=columns.unsqueeze(0))
    if layer > 0:
        heads = [seen[name].unflatten(-1, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj")]
        rotate = sys.modules[type(layers[0]).__module__].apply_rotary_pos_emb
        seen["query"], seen["key"] = rotate(*heads, *seen["rotary"])
    return seen


def directly(prompts: Prompts, method: str, b: int, k: int, layout: Any, saliency: list[Tensor]) -> Tensor:
    """The method's function on the tensors of sample b alone, without its padding."""
    real = prompts.inputs["attention_mask"][b].bool()
    visual = torch.isin(prompts.inputs["input_ids"][b][real], torch.tensor(prompts.visual)).nonzero().squeeze(1)
    behind = slice(int(visual[-1]) + 1, None)
    layer = 2 if method in IN_MODEL else 0
    run = eager_run(prompts, layer)
    hidden = run["hidden"][b : b + 1, real]
    features, text = hidden[:, visual], hidden[:, behind]
    geometry = {name: t[b : b + 1, : len(visual)] for name, t in vars(layout).items()}
    if layer:
        attention = {"query": run["query"][b : b + 1, :, real][:, :, behind], "key": run["key"][b : b + 1, :, real]}
        attention["key_indices"] = visual.unsqueeze(0)
    if method == "coast":
        return methods.coast(features=features, k=k, **attention).indices
    if method == "fastv":
        return methods.fastv(k=k, **attention).indices
    if method == "adaptprune":
        keys = prompts.model.model.language_model.layers[2].self_attn.k_proj(features)
        return methods.adaptprune(
            features=keys,
            positions=geometry["positions"],
            k=k,
            grid=geometry["grids"],
            groups=geometry["groups"],
            **attention,
        ).indices
    if method == "adafv":
        return methods.adafv(text, features, saliency[b].unsqueeze(0).float(), k).indices
    if method == "zspaprune":
        return methods.zspaprune(text, features, k).indices
    if method == "divprune":
        return methods.divprune(features, k).indices
    raise AssertionError(method)


@pytest.mark.parametrize("method", ["adafv", "adaptprune", "coast", "divprune", "fastv", "zspaprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_are_those_of_the_method_on_an_unpruned_eager_run(family: str, method: str) -> None:
    prompts = prompts_of(family, "ragged")
    with pruned(prompts, method, 0.4) as pruning:
        generate(prompts, 1)
    saliency = SALIENCY[family](prompts) if method == "adafv" else []
    for b, k in enumerate(pruning.stats["after"]):
        expected = directly(prompts, method, b, k, layout_in(pruning), saliency)
        assert pruning.kept[b, :k].tolist() == expected[0].tolist()
        assert (pruning.kept[b, k:] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_of_sts_on_an_unpruned_eager_run(family: str) -> None:
    prompts = prompts_of(family, "single")
    with pruned(prompts, "sts", 20) as pruning:
        generate(prompts, 1)
    layout = layout_in(pruning)
    visual = (prompts.inputs["input_ids"][0] == prompts.visual).nonzero().squeeze(1)
    features = eager_run(prompts, 0)["hidden"][:, visual]
    depth = layout.groups.unsqueeze(-1) * layout.grids.norm(dim=-1).max()
    coordinates = torch.cat([layout.positions, depth], -1)
    first = methods.sts_structure(features, 40, positions=coordinates).indices
    assert torch.equal(pruning.kept_at[0], first)
    is_visual = prompts.inputs["input_ids"][0] == prompts.visual
    columns = torch.cat([(~is_visual).nonzero().squeeze(1), visual[first[0]]]).sort().values
    left = is_visual[columns].nonzero().squeeze(1)
    run = eager_run(prompts, 2, columns)
    second = methods.sts_semantics(
        run["query"][:, :, int(left[-1]) + 1 :], run["key"], 20, key_indices=left.unsqueeze(0)
    ).indices
    assert torch.equal(pruning.kept, first[:, second[0]])


# --- saliency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "batch"), [*((family, "ragged") for family in FAMILIES), ("llava_onevision", "video")]
)
def test_saliency_is_that_of_eager_attention_weights(family: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(family, batch)
    given = {}

    def spy(**arguments: Any) -> Any:
        given[len(given)] = arguments["saliency"]
        return methods.adafv(**arguments)

    spy_on(monkeypatch, "adafv", "adafv", spy)
    with pruned(prompts, "adafv", 7) as pruning:  # one number for both samples: one call
        generate(prompts, 1)
    expected = (onevision_video_saliency if batch == "video" else SALIENCY[family])(prompts)
    assert len(given) == 1
    assert pruning.stats["before"] == [len(row) for row in expected]
    for row, exact in zip(given[0], expected, strict=True):  # a tower in float32, with logits of up to 10 or so
        torch.testing.assert_close(row[: len(exact)].double(), exact, rtol=1e-4, atol=1e-7)
        assert (row[len(exact) :] == 0).all()
        assert exact.max() > 1.05 * exact[exact > 0].min()  # not all the same


# --- entering and leaving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_the_block_restores_the_model(family: str) -> None:
    prompts = prompts_of(family, "ragged")
    core = prompts.model.model
    before = dict(vars(core))
    _, logits = generate(prompts, 2)

    def fail() -> None:
        with pruned(prompts, "adafv", 5):
            generate(prompts, 1)
            assert vars(core).keys() > before.keys()  # one of its methods is watched
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(core) == before
    assert torch.equal(generate(prompts, 2)[1], logits)


def test_images_encoded_inside_the_block_are_pruned() -> None:
    prompts = prompts_of("llava_next", "ragged")
    if not beams_are_repeated_after_encoding(prompts):
        pytest.skip("this version of transformers takes no encoded images")
    names = ("pixel_values", "image_sizes")
    with torch.no_grad(), pruned(prompts, "adafv", 5) as pruning:
        expected = prompts.model(**prompts.inputs).logits
        kept = pruning.kept
        encoded = prompts.model.get_image_features(**{n: prompts.inputs[n] for n in names}, return_dict=True)
        text = {n: t for n, t in prompts.inputs.items() if n not in names}
        logits = prompts.model(**text, mm_encoder_outputs={"image": encoded}).logits
    assert torch.equal(logits, expected)
    assert torch.equal(pruning.kept, kept)


def test_sliding_windows_of_mistral_are_refused() -> None:
    prompts = FAMILIES["llava_next"]()
    config = prompts.model.model.language_model.config
    config.sliding_window = 16  # as in a MistralConfig, which has no layer_types
    with pytest.raises(NotImplementedError, match="full attention"), pruned(prompts, "fastv", 5):
        pass
