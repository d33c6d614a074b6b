"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL under `prune_visual_tokens`: mRoPE, ragged images, videos, windows, DeepStack."""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers.vlm import models_qwen as qwen
from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import spy_on
from tests.transformers.vlm.models import Prompts
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens
from tokenprune_kernels.integrations.transformers.adapters.qwen_vl import frames_of
from tokenprune_kernels.integrations.transformers.registry import family_of

KEEP = 0.4
# 32 + 12 visual tokens and 14 text tokens against 16 and 9: padding on the left, sizes and numbers of images differ.
RAGGED = [[3, (1, 8, 12), 2, (1, 4, 8), 2, ("video", (3, 4, 4)), 5], [2, (1, 8, 8), 4]]
IMAGES = [[3, (1, 8, 12), 2, (1, 4, 8), 5], [2, (1, 8, 8), 4]]
# float32 against float64 through ten layers, logits up to 5: seen 2e-5.
CLOSE = {"rtol": 0.0, "atol": 4e-5}


@functools.cache
def model(name: str) -> Any:
    return qwen.model(name)


@functools.cache
def batch(name: str) -> Prompts:
    return qwen.prompts(model(name), RAGGED)


@functools.cache
def images(name: str) -> Prompts:
    return qwen.prompts(model(name), IMAGES)


def generate(prompts: Prompts, new: int, **more: Any) -> tuple[Any, Tensor]:
    """What generate returns, and the new tokens."""
    given = {
        "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True, "suppress_tokens": qwen.SPECIAL, **more,
    }  # fmt: skip
    with torch.no_grad():
        out = prompts.model.generate(**prompts.inputs, **given)
    return out, out.sequences[:, prompts.inputs["input_ids"].shape[1] :]


def exact(prompts: Prompts, pruning: Any, new: Tensor, compacted: bool = False, **more: Any) -> Tensor:
    """[B, steps, vocabulary]: the float64 logits each of the new tokens was chosen by."""
    start = prompts.inputs["input_ids"].shape[1]
    drops = [
        oracle.Drop(layer, oracle.dropped_columns(prompts, kept), compacted) for layer, kept in pruning.kept_at.items()
    ]
    return oracle.logits(prompts, drops, new[:, :-1], **more)[:, start - 1 :]


def greedy(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., qwen.SPECIAL] = -torch.inf
    logits[..., 1] = -torch.inf  # the end of the text, kept out by min_new_tokens
    return logits.argmax(-1)


@contextmanager
def tower_calls(prompts: Prompts) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = prompts.model.model.visual.register_forward_hook(lambda m, a, o: calls.append(1))
    yield calls
    handle.remove()


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", qwen.NAMES)
def test_32_greedy_tokens_equal_the_exact_path(name: str, method: str) -> None:
    prompts = batch(name)
    with prune_visual_tokens(prompts.model, method, KEEP, seed=1) as pruning, tower_calls(prompts) as calls:
        out, new = generate(prompts, 32)
    assert pruning.stats["before"] == [44, 16]
    assert pruning.kept is not None
    assert pruning.stats["after"] == (pruning.kept >= 0).sum(1).tolist() == [18, 6]
    assert len(calls) == 2  # the images, and the video
    want = exact(prompts, pruning, new)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)
    assert torch.equal(new, greedy(want))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", qwen.NAMES)
def test_all_kept_is_the_model_itself(name: str, method: str) -> None:
    prompts = batch(name)
    with torch.no_grad():
        before = prompts.model(**prompts.inputs).logits
        with prune_visual_tokens(prompts.model, method, 1.0) as pruning:
            inside = prompts.model(**prompts.inputs).logits
        after = prompts.model(**prompts.inputs).logits
    assert torch.equal(inside, before)
    assert torch.equal(after, before)
    assert pruning.kept is not None
    assert (pruning.kept >= 0).sum(1).tolist() == [44, 16]


@pytest.mark.parametrize("name", qwen.NAMES)
def test_a_count_that_only_one_sample_exceeds(name: str) -> None:
    prompts = images(name)
    with prune_visual_tokens(prompts.model, "coast", 20) as pruning:
        out, new = generate(prompts, 4)
    assert pruning.stats["after"] == [20, 16]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
def test_without_padding_there_is_no_mask(name: str) -> None:
    prompts = qwen.prompts(model(name), [[3, (1, 8, 12), 4]])
    with prune_visual_tokens(prompts.model, "sts", 6) as pruning:
        out, new = generate(prompts, 4)
    assert list(pruning.kept_at) == [0, 2]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_every_pruning_layer_with_deepstack_before_and_behind_it(name: str, layer: int) -> None:
    """Features are added behind decoder layers 0, 1 and 2."""
    prompts = batch(name)
    compacted = layer == 2
    with prune_visual_tokens(prompts.model, "fastv", KEEP, layer=layer, compact_cache=compacted) as pruning:
        out, new = generate(prompts, 3)
    assert list(pruning.kept_at) == [layer]
    want = exact(prompts, pruning, new, compacted)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), want, **CLOSE)


@pytest.mark.parametrize("method", ["divprune", "coast"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_decoding_by_hand(name: str, method: str) -> None:
    """The model then adds rope_deltas to the length of a cache, which pruning has shortened."""
    prompts = batch(name)
    inputs = prompts.inputs
    new = torch.tensor([[17, 40], [33, 58]])
    mask = inputs["attention_mask"]
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, KEEP) as pruning:
        out = prompts.model(**inputs, use_cache=True)
        steps = [out.logits[:, -1]]
        for at in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            out = prompts.model(input_ids=new[:, at : at + 1], attention_mask=mask, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    more = torch.cat([new, new[:, :1]], 1)
    positions = positions_by_deltas(prompts, 2)
    want = exact(prompts, pruning, more, position_ids=positions)
    torch.testing.assert_close(torch.stack(steps, 1).double(), want, **CLOSE)


def positions_by_deltas(prompts: Prompts, new: int) -> Tensor:
    """[3, B, L + new]: those of the prompt, and on from the largest."""
    given = {n: t for n, t in prompts.inputs.items() if not n.startswith("pixel")}
    positions, deltas = prompts.model.model.get_rope_index(**given)
    lengths = prompts.inputs["attention_mask"].sum(1, keepdim=True)
    behind = lengths + deltas + torch.arange(new)
    return torch.cat([positions, behind.expand(3, -1, -1)], 2)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_video_whose_positions_run_ahead_of_the_text(by_hand: bool) -> None:
    """Seconds stretch Qwen2.5-VL's positions in time; generate and the model's own count then differ."""
    prompts = qwen.prompts(model("qwen2_5_vl"), [[3, ("video", (3, 4, 8)), 4]])
    prompts.inputs["second_per_grid_ts"] = torch.tensor([6.0])
    with torch.no_grad(), prune_visual_tokens(prompts.model, "zspaprune", 7) as pruning:
        if not by_hand:
            out, new = generate(prompts, 3)
            got, positions = torch.stack(out.logits, 1), None
        else:
            new = torch.tensor([[17, 40, 0]])
            positions = positions_by_deltas(prompts, 2)
            out = prompts.model(**prompts.inputs, use_cache=True)
            first = out.logits[:, -1:]
            cache = out.past_key_values
            got = torch.cat(
                [first] + [prompts.model(input_ids=new[:, i : i + 1], past_key_values=cache).logits for i in (0, 1)], 1
            )
    torch.testing.assert_close(got.double(), exact(prompts, pruning, new, position_ids=positions), **CLOSE)


@pytest.mark.parametrize("method", ["adafv", "coast"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_beam_search(name: str, method: str) -> None:
    """Beams of a sample share its kept tokens, and follow the logits of their own words."""
    prompts = images(name)
    beams, steps = 3, 5
    with prune_visual_tokens(prompts.model, method, KEEP) as pruning, tower_calls(prompts) as calls:
        out, new = generate(prompts, steps, num_beams=beams)
    assert len(calls) == 1
    per_beam = {layer: kept.unflatten(0, (2, beams)) for layer, kept in pruning.kept_at.items()}
    assert all(torch.equal(kept[:, i], kept[:, 0]) for kept in per_beam.values() for i in range(beams))
    drops = [oracle.Drop(layer, oracle.dropped_columns(prompts, kept[:, 0])) for layer, kept in per_beam.items()]
    start = prompts.inputs["input_ids"].shape[1]
    want = oracle.logits(prompts, drops, new[:, :-1])[:, start - 1 :]
    rows = out.beam_indices[:, :steps]
    got = torch.stack([logits[rows[:, step]] for step, logits in enumerate(out.logits)], 1)
    torch.testing.assert_close(got.double(), want, **CLOSE)


@pytest.mark.parametrize("name", qwen.NAMES)
def test_sampling(name: str) -> None:
    prompts = images(name)
    with prune_visual_tokens(prompts.model, "adafv", KEEP) as pruning:
        out, new = generate(prompts, 4, do_sample=True)
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), exact(prompts, pruning, new), **CLOSE)


# --- the layout -------------------------------------------------------------------------------------------------------


def layouts(prompts: Prompts) -> list[Any]:
    """From the grids, and from the positions alone."""
    core, inputs = prompts.model.model, prompts.inputs
    family = family_of(prompts.model)
    shapes = {n: t for n, t in inputs.items() if not n.startswith("pixel")}
    positions, _ = core.get_rope_index(**shapes)
    text_only = {n: t for n, t in shapes.items() if not n.endswith("grid_thw")}
    is_visual = torch.isin(inputs["input_ids"], torch.tensor(prompts.visual))
    counts = is_visual.sum(1).tolist()
    made = [family.layout(core, shapes, counts)]
    # Positions alone are what generate leaves where it encodes the images beforehand.
    if "mm_encoder_outputs" in inspect.signature(core.forward).parameters:
        made.append(family.layout(core, {**text_only, "position_ids": positions}, counts))
    return made


@pytest.mark.parametrize("name", qwen.NAMES)
def test_layout_by_hand(name: str) -> None:
    """Merged grids: a video of two frames 1 x 2 in front of an image 2 x 3; and an image 2 x 1."""
    prompts = qwen.prompts(model(name), [[1, ("video", (2, 2, 4)), 1, (1, 4, 6), 1], [2, (1, 4, 2), 1]])
    for layout in layouts(prompts):
        coordinates = [[0, 0], [0, 1]] * 2 + [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
        assert layout.positions[0].tolist() == coordinates
        assert layout.positions[1, :2].tolist() == [[0, 0], [1, 0]]
        assert layout.grids[0].tolist() == [[1, 2]] * 4 + [[2, 3]] * 6
        assert layout.grids[1, :2].tolist() == [[2, 1]] * 2
        assert layout.groups[0].tolist() == layout.images[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
        assert layout.groups[1, :2].tolist() == [0, 0]
        boxes = [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]
        assert layout.boxes[0, :4].tolist() == boxes * 2
        torch.testing.assert_close(layout.boxes[0, 8], torch.tensor([1 / 3, 0.5, 2 / 3, 1.0]))


def test_prompts_without_the_types_of_their_tokens_are_refused() -> None:
    """generate then numbers an image as text, and nothing says how large it is."""
    core = model("qwen2_vl").model
    ids = torch.tensor([[5, qwen.IMAGE, qwen.IMAGE, qwen.IMAGE, qwen.IMAGE, 7]])
    inputs = {"input_ids": ids, "position_ids": torch.arange(6).expand(4, 1, -1)}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        frames_of(core, inputs, [4])
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        frames_of(core, {"input_ids": ids}, [4])


# --- AdaFV's saliency -------------------------------------------------------------------------------------------------


def eager_weights(prompts: Prompts) -> dict[Any, list[Tensor]]:
    """The float64 attention weights [H, S, S] of every vision layer, chunk by chunk."""
    exact64 = oracle.in_float64(prompts)
    tower = exact64.model.model.visual
    seen: dict[Any, list[Tensor]] = {}

    def attend(
        m: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **kw: Any
    ) -> tuple[Tensor, None]:
        weights = (q @ k.mT * scaling).softmax(-1)
        seen.setdefault(list(tower.blocks).index(next(b for b in tower.blocks if b.attn is m)), []).append(weights[0])
        return (weights @ v).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("recorded_weights", attend)
    tower.config._attn_implementation = "recorded_weights"
    with torch.no_grad():
        exact64.model(**exact64.inputs)
    return seen


def by_windows(height: int, width: int) -> list[int]:
    """Qwen2.5-VL's order: windows of 2 x 2 tokens in raster order, and raster order in each."""
    return sorted(range(height * width), key=lambda i: (i // width // 2, i % width // 2, i // width, i % width))


def saliency_by_hand(prompts: Prompts, name: str) -> list[Tensor]:
    weights = eager_weights(prompts)
    chunks = weights[1 if name == "qwen2_5_vl" else 2]
    received = [w.mean((0, 1)).view(-1, 4).mean(1) for w in chunks]
    grids = [(4, 6), (2, 4), (4, 4), (2, 2), (2, 2), (2, 2)]  # the tower runs over all images, then over the video
    assert [len(r) for r in received] == [h * w for h, w in grids]
    if name == "qwen2_5_vl":
        for i, (height, width) in enumerate(grids):
            raster = torch.empty_like(received[i])
            raster[torch.tensor(by_windows(height, width))] = received[i]
            received[i] = raster
    return [torch.cat([received[0], received[1], *received[3:]]), received[2]]


def flash_by_chunks(
    m: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, cu_seq_lens_q: Tensor, **kw: Any
) -> tuple[Tensor, None]:
    """Called as FlashAttention is: all images at once."""
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    out = [torch.nn.functional.scaled_dot_product_attention(*part) for part in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_by_chunks"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_saliency_is_the_attention_received(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = batch(name)
    ALL_ATTENTION_FUNCTIONS.register("flash_by_chunks", flash_by_chunks)
    seen: list[Tensor] = []

    def adafv(**given: Any) -> Any:
        seen.append(given["saliency"])
        return methods.adafv(**given)

    spy_on(monkeypatch, "adafv", "adafv", adafv)
    config = prompts.model.model.visual.config
    monkeypatch.setattr(config, "_attn_implementation_internal", attention)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "adafv", KEEP):
        prompts.model(**prompts.inputs)
    assert config._attn_implementation == attention
    # Samples with other budgets are calls of their own, the smaller first.
    for got, want in zip([seen[1][0], seen[0][0, :16]], saliency_by_hand(prompts, name), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0.0)


# --- the selection ----------------------------------------------------------------------------------------------------


def eager_run(prompts: Prompts, layer: int) -> dict[str, Any]:
    """What an unpruned eager run shows in front of a decoder layer, and in the attention before it."""
    made = copy.deepcopy(prompts.model)
    made.set_attn_implementation("eager")
    decoder = made.model.language_model
    seen: dict[str, Any] = {"model": made}

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **kw: Any) -> Any:
        if m is decoder.layers[layer - 1].self_attn and layer:
            seen.update(query=q, key=k)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        weights = (q @ k.mT * scaling + attention_mask[..., : k.shape[2]]).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("recorded_eager", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recorded_eager", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    decoder.config._attn_implementation = "recorded_eager"

    def remember(m: Any, args: Any, kwargs: Any) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    decoder.layers[layer].register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        made(**prompts.inputs)
    return seen


def chosen_directly(prompts: Prompts, name: str, method: str, layer: int, sample: int, k: int) -> Tensor:
    """The method on one sample without its padding."""
    seen = eager_run(prompts, layer)
    real = prompts.inputs["attention_mask"][sample].bool()
    ids = prompts.inputs["input_ids"][sample][real]
    columns = torch.isin(ids, torch.tensor(prompts.visual)).nonzero().squeeze(1)
    hidden = seen["hidden"][sample : sample + 1, real]
    features, text = hidden[:, columns], hidden[:, columns[-1] + 1 :]
    grids = [[(4, 6), (2, 4), (2, 2), (2, 2), (2, 2)], [(4, 4)]][sample]
    coordinates = torch.tensor([[[r, c] for h, w in grids for r in range(h) for c in range(w)]]).float()
    sizes = torch.tensor([[[h, w] for h, w in grids for _ in range(h * w)]]).float()
    groups = torch.tensor([[g for g, (h, w) in enumerate(grids) for _ in range(h * w)]])
    if method == "divprune":
        return methods.divprune(features, k).indices
    if method == "zspaprune":
        return methods.zspaprune(text, features, k).indices
    if method == "adafv":
        saliency = saliency_by_hand(prompts, name)[sample].float().unsqueeze(0)
        return methods.adafv(text, features, saliency, k).indices
    rows = torch.arange(int(columns[-1]) + 1, len(ids))
    shown = {
        "query": seen["query"][sample : sample + 1, :, real][:, :, rows],
        "key": seen["key"][sample : sample + 1, :, real],
        "key_indices": columns.unsqueeze(0),
        "query_positions": rows.unsqueeze(0),
    }
    if method == "fastv":
        return methods.fastv(k=k, **shown).indices
    if method == "coast":
        return methods.coast(features=features, k=k, **shown).indices
    assert method == "adaptprune"
    keys = seen["model"].model.language_model.layers[layer].self_attn.k_proj(features).detach()
    return methods.adaptprune(features=keys, positions=coordinates, grid=sizes, groups=groups, k=k, **shown).indices


@pytest.mark.parametrize("method", ["coast", "adafv", "zspaprune", "adaptprune", "fastv", "divprune"])
@pytest.mark.parametrize("name", qwen.NAMES)
def test_kept_is_what_the_method_chooses_on_an_eager_run(name: str, method: str) -> None:
    prompts = batch(name)
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, KEEP) as pruning:
        prompts.model(**prompts.inputs)
    (layer,) = pruning.kept_at
    assert pruning.kept is not None
    for sample, k in enumerate([18, 6]):
        want = chosen_directly(prompts, name, method, layer, sample, k)
        assert torch.equal(pruning.kept[sample, :k], want[0])


@pytest.mark.parametrize("name", qwen.NAMES)
def test_both_stages_of_sts_on_an_eager_run(name: str) -> None:
    """Without padding; stage 2 sees what stage 1 left, so the eager run of stage 2 is the pruned one's prompt."""
    prompts = batch(name)
    seen = eager_run(prompts, 0)
    with torch.no_grad(), prune_visual_tokens(prompts.model, "sts", KEEP) as pruning:
        prompts.model(**prompts.inputs)
    ids = prompts.inputs["input_ids"]
    columns = torch.isin(ids[1], torch.tensor(prompts.visual)).nonzero().squeeze(1)
    coordinates = torch.tensor([[[r, c, 0] for r in range(4) for c in range(4)]]).float()
    want = methods.sts_structure(seen["hidden"][1:, columns], 12, positions=coordinates).indices
    assert torch.equal(pruning.kept_at[0][1, :12], want[0])
    assert set(pruning.kept_at[2][1, :6].tolist()) < set(want[0].tolist())
