"""What is pruned of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the layout of their prompts, the saliency, the selection."""

import copy
import inspect
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
from tests.transformers.vlm.runs_qwen import KEEP, batch, model
from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.transformers.adapters.frames import frames_of
from tokenprune_kernels.integrations.transformers.registry import family_of

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
