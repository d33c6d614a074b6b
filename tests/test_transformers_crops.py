"""prune_visual_tokens on models that see pictures in crops, tiles or frames: LLaVA-NeXT, LLaVA-OneVision, InternVL3."""

import copy
import functools
import inspect
import itertools
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from vlm import oracle
from vlm.models import Prompts
from vlm.models_crops import FAMILIES, RAGGED, SEVERAL, SINGLE, VIDEOS

from tokenprune_kernels import methods
from tokenprune_kernels.integrations.transformers import METHODS, prune_visual_tokens

BATCHES = {"single": SINGLE, "ragged": RAGGED, "several": SEVERAL, "beside text alone": [[], [(20, 44)]]}
CASES = [*itertools.product(FAMILIES, BATCHES), *((family, "video") for family in VIDEOS)]
IN_MODEL = ("coast", "sts", "adaptprune", "fastv")


@functools.cache
def prompts_of(family: str, batch: str) -> Prompts:
    """Shared by all tests: leaving a block restores the model."""
    return VIDEOS[family]() if batch == "video" else FAMILIES[family](BATCHES[batch])


def pruned(prompts: Prompts, method: str, keep: int | float, **more: Any) -> Any:
    layer = {"layer": 2} if method in IN_MODEL else {}
    return prune_visual_tokens(prompts.model, method, keep, seed=5, **layer, **more)


def generate(prompts: Prompts, steps: int) -> tuple[Tensor, Tensor]:
    """The new tokens [B, steps] of greedy decoding, and the logits of every step [B, steps, vocabulary]."""
    visual = torch.tensor(prompts.visual).flatten().tolist()
    with torch.no_grad():
        out = prompts.model.generate(
            **prompts.inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, suppress_tokens=visual,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, prompts.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def layout_in(pruning: Any) -> Any:
    return pruning._hooks.report.layout


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_tokens_changes_no_bit(family: str, method: str) -> None:
    prompts = prompts_of(family, "ragged")
    tokens, logits = generate(prompts, 4)
    with pruned(prompts, method, 1.0) as pruning:
        same_tokens, same_logits = generate(prompts, 4)
    assert torch.equal(same_logits, logits)
    assert torch.equal(same_tokens, tokens)
    assert pruning.stats["after"] == pruning.stats["before"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_logits_and_greedy_tokens_equal_the_float64_path(family: str, batch: str, method: str) -> None:
    prompts = prompts_of(family, batch)
    with pruned(prompts, method, 0.4) as pruning:
        new, logits = generate(prompts, 32 if batch == "single" else 5)
    before = torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual)).sum(1).tolist()
    assert pruning.stats["before"] == before
    assert pruning.stats["after"] == [round(0.4 * n) for n in before]
    assert (pruning.kept >= 0).sum(1).tolist() == pruning.stats["after"]

    drops = [oracle.Drop(at, oracle.dropped_columns(prompts, kept)) for at, kept in pruning.kept_at.items()]
    more = {}
    if method == "adafv":  # its positions are numbered anew
        real = torch.cat([prompts.inputs["attention_mask"].bool() & ~drops[0].columns, new[:, 1:] >= 0], 1)
        more["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
    expected = oracle.logits(prompts, drops, new[:, :-1], **more)[:, -new.shape[1] :]
    assert (logits - expected).abs().max() < 2e-6  # logits of up to 1, in float32
    expected[..., torch.tensor(prompts.visual)] = -torch.inf
    assert torch.equal(new, expected.argmax(-1))


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


def beams_are_repeated_after_encoding(prompts: Prompts) -> bool:
    return "mm_encoder_outputs" in inspect.signature(prompts.model.forward).parameters


@pytest.mark.parametrize("method", ["adafv", "adaptprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_keep_what_their_sample_keeps(family: str, method: str) -> None:
    prompts = prompts_of(family, "several")
    if not beams_are_repeated_after_encoding(prompts):
        # Older versions repeat crop by crop, which mixes the pictures of a sample up even without pruning.
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
    place = {name: t[b : b + 1, : len(visual)] for name, t in vars(layout).items()}
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
            features=keys, positions=place["positions"], k=k, grid=place["grids"], groups=place["groups"], **attention
        ).indices
    if method == "adafv":
        return methods.adafv(text, features, saliency[b].unsqueeze(0).float(), k).indices
    if method == "zspaprune":
        return methods.zspaprune(text, features, k).indices
    if method == "divprune":
        return methods.divprune(features, k).indices
    raise AssertionError(method)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"sts", "random"}))
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
    places = torch.cat([layout.positions, depth], -1)
    first = methods.sts_structure(features, 40, positions=places).indices
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


def vision_weights(prompts: Prompts, attention: str, layer: int) -> list[Tensor]:
    """[crops, heads, queries, keys] in float64, of each run of the tower, from its eager attention."""
    exact = oracle.in_float64(prompts)
    exact.model.set_attn_implementation("eager")
    tower = exact.model.model.vision_tower
    encoder = getattr(tower, "vision_model", tower).encoder
    seen: list[Tensor] = []
    module = getattr(list(getattr(encoder, "layers", None) or encoder.layer)[layer], attention)
    module.register_forward_hook(lambda m, a, output: seen.append(output[1]))
    with torch.no_grad():
        exact.model(**exact.inputs)
    return seen


def llava_next_saliency(prompts: Prompts) -> list[Tensor]:
    """By hand for the pictures of RAGGED: 4 x 12 patches of which columns 2..9 are left, and 8 x 8, columns 2..5."""
    (weights,) = vision_weights(prompts, "self_attn", -2)
    crops = weights[:, :, 0, 1:].mean(1).view(-1, 4, 4)
    assert len(crops) == 4 + 5
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:10]
    tall = torch.cat([torch.cat([crops[5], crops[6]], 1), torch.cat([crops[7], crops[8]], 1)], 0)[:, 2:6]
    return [
        torch.cat([base.flatten(), torch.nn.functional.pad(rest, (0, 1)).flatten()])
        for base, rest in ((crops[0], wide), (crops[4], tall))
    ]


def shrunk(grid: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, without antialiasing: two rows and two columns around each sample point."""
    result = grid.new_zeros(height, width)
    for i, j in itertools.product(range(height), range(width)):
        y, x = (i + 0.5) * grid.shape[0] / height - 0.5, (j + 0.5) * grid.shape[1] / width - 0.5
        for r, c in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
            result[i, j] += grid[r, c] * max(0, 1 - abs(r - y)) * max(0, 1 - abs(c - x))
    return result


def llava_onevision_saliency(prompts: Prompts) -> list[Tensor]:
    """By hand for RAGGED: 5 x 15 patches of which columns 2..12 are left, and 15 x 10 shrunk to 8 x 5."""
    (weights,) = vision_weights(prompts, "self_attn", -1)
    crops = weights.mean((1, 2)).view(-1, 5, 5)
    assert len(crops) == 4 + 7
    wide = torch.cat([crops[1], crops[2], crops[3]], 1)[:, 2:13]
    tall = torch.cat([torch.cat([crops[5 + 2 * r], crops[6 + 2 * r]], 1) for r in range(3)], 0)
    return [
        torch.cat([base.flatten(), torch.nn.functional.pad(rest, (0, 1)).flatten()])
        for base, rest in ((crops[0], wide), (crops[4], shrunk(tall, 8, 5)))
    ]


def blocks(grid: Tensor) -> Tensor:
    """The mean over each 2 x 2 block, one block after the other."""
    rows, columns = grid.shape
    return torch.stack([grid[r : r + 2, c : c + 2].mean() for r in range(0, rows, 2) for c in range(0, columns, 2)])


def internvl_saliency(prompts: Prompts) -> list[Tensor]:
    """RAGGED is 1 x 3 tiles and 3 x 2, each with a thumbnail."""
    (weights,) = vision_weights(prompts, "attention", -1)
    tiles = [blocks(tile) for tile in weights[:, :, 0, 1:].mean(1).view(-1, 8, 8)]
    assert len(tiles) == 4 + 7
    return [torch.cat(tiles[:4]), torch.cat(tiles[4:])]


def onevision_video_saliency(prompts: Prompts) -> list[Tensor]:
    """A video, and a picture with a video: frames of 5 x 5 are pooled to 3 x 3, and a newline ends the video."""
    pictures, frames = (w.mean((1, 2)).view(-1, 5, 5) for w in vision_weights(prompts, "self_attn", -1))
    zero = frames.new_zeros(1)
    videos = [torch.cat([*(shrunk(f, 3, 3).flatten() for f in each), zero]) for each in frames.view(2, 3, 5, 5)]
    wide = torch.cat([pictures[1], pictures[2], pictures[3]], 1)[:, 2:13]
    picture = torch.cat([pictures[0].flatten(), torch.nn.functional.pad(wide, (0, 1)).flatten()])
    return [videos[0], torch.cat([picture, videos[1]])]


SALIENCY = {
    "llava_next": llava_next_saliency, "llava_onevision": llava_onevision_saliency, "internvl": internvl_saliency,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "batch"), [*((family, "ragged") for family in FAMILIES), ("llava_onevision", "video")]
)
def test_saliency_is_that_of_eager_attention_weights(family: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(family, batch)
    adafv, given = methods.adafv, {}

    def spy(text: Tensor, features: Tensor, saliency: Tensor, k: int, **more: Any) -> Any:
        given[len(given)] = saliency
        return adafv(text, features, saliency, k, **more)

    monkeypatch.setattr(methods, "adafv", spy)
    with pruned(prompts, "adafv", 7) as pruning:  # one number for both samples: one call
        generate(prompts, 1)
    expected = (onevision_video_saliency if batch == "video" else SALIENCY[family])(prompts)
    assert len(given) == 1
    assert pruning.stats["before"] == [len(row) for row in expected]
    for row, exact in zip(given[0], expected, strict=True):  # a tower in float32, with logits of up to 10 or so
        torch.testing.assert_close(row[: len(exact)].double(), exact, rtol=1e-4, atol=1e-7)
        assert (row[len(exact) :] == 0).all()
        assert exact.max() > 1.05 * exact[exact > 0].min()  # not all the same


# --- where the tokens are -----------------------------------------------------------------------------------------


def layout_for(prompts: Prompts) -> Any:
    with pruned(prompts, "random", 3) as pruning:
        generate(prompts, 1)
    return layout_in(pruning)


def check_layout(layout: Any, b: int, expected: list[tuple[Any, ...]]) -> None:
    """expected: (row, column, grid, group, image, box) of each token of sample b."""
    names = ("positions", "grids", "groups", "images", "boxes")
    found = [getattr(layout, name)[b][: len(expected)].double() for name in names]
    rows = [((r, c), grid, group, image, box) for r, c, grid, group, image, box in expected]
    for name, value, wanted in zip(names, found, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(
            value, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def whole(side: int, group: int, image: int, grid: tuple[int, int] | None = None) -> list[tuple[Any, ...]]:
    """A square grid that sees all of a picture."""
    return [
        (r, c, (side, side), group, image, (c / side, r / side, (c + 1) / side, (r + 1) / side))
        for r in range(side)
        for c in range(side)
    ]


def inside(value: float) -> float:
    return min(1.0, max(0.0, value))


def next_wide(group: int, image: int) -> list[tuple[Any, ...]]:
    """20 x 44 pixels in LLaVA-NeXT: 4 x 12 patches in three crops; the picture is 8.8 wide, of 1.6 to 10.4."""
    tokens = whole(4, group, image)
    for r in range(4):
        for x in range(2, 10):
            left, right = inside((x - 1.6) / 8.8), inside((x - 0.6) / 8.8)
            tokens.append((r, x % 4, (4, 4), group + 1 + x // 4, image, (left, r / 4, right, (r + 1) / 4)))
        end = inside(8.4 / 8.8)
        tokens.append((r, 2, (4, 4), group + 3, image, (end, r / 4, end, (r + 1) / 4)))
    return tokens


def test_layout_of_llava_next() -> None:
    layout = layout_for(prompts_of("llava_next", "several"))
    # 16 x 16 pixels: the first of the equally good 16 x 32, of which the middle 4 x 4 patches are left.
    square = whole(4, 4, 1)
    for r in range(4):
        for x in range(2, 6):
            square.append((r, x % 4, (4, 4), 5 + x // 4, 1, ((x - 2) / 4, r / 4, (x - 1) / 4, (r + 1) / 4)))
        square.append((r, 2, (4, 4), 6, 1, (1.0, r / 4, 1.0, (r + 1) / 4)))
    check_layout(layout, 0, next_wide(0, 0) + square)
    assert layout.positions.shape[1] == 52 + 36


def test_layout_of_llava_onevision_shrinks_the_grid_of_every_crop() -> None:
    layout = layout_for(FAMILIES["llava_onevision"]([[(60, 60)]]))
    expected = whole(5, 0, 0)
    side = 7 / 3  # 15 patches in three crops, shrunk to 7 tokens
    crop = [0, 0, 1, 1, 1, 2, 2]
    for r in range(7):
        for c in range(7):
            group = 1 + 3 * crop[r] + crop[c]
            box = (c / 7, r / 7, (c + 1) / 7, (r + 1) / 7)
            expected.append((r - crop[r] * side, c - crop[c] * side, (side, side), group, 0, box))
        beside = 7 - 2 * side
        expected.append((r - crop[r] * side, beside, (side, side), 3 + 3 * crop[r], 0, (1.0, r / 7, 1.0, (r + 1) / 7)))
    check_layout(layout, 0, expected)


def test_layout_of_several_pictures_in_llava_onevision() -> None:
    layout = layout_for(prompts_of("llava_onevision", "several"))
    # No crops: padded to a square. 20 x 44 pixels are 25/11 x 5 patches in the middle of 5 x 5.
    top, high = (5 - 25 / 11) / 2, 25 / 11
    expected = [
        (r, c, (5, 5), 0, 0, (c / 5, inside((r - top) / high), (c + 1) / 5, inside((r + 1 - top) / high)))
        for r in range(5)
        for c in range(5)
    ]
    expected.append((4, 5, (5, 5), 0, 0, (1.0, 1.0, 1.0, 1.0)))
    expected += [*whole(5, 1, 1), (4, 5, (5, 5), 1, 1, (1.0, 0.8, 1.0, 1.0))]
    check_layout(layout, 0, expected)


def test_layout_of_a_picture_and_a_video_in_llava_onevision() -> None:
    layout = layout_for(prompts_of("llava_onevision", "video"))

    def video(group: int, image: int) -> list[tuple[Any, ...]]:
        frames = [token for f in range(3) for token in whole(3, group + f, image + f)]
        return [*frames, (2, 3, (3, 3), group + 2, image + 2, (1.0, 2 / 3, 1.0, 1.0))]

    check_layout(layout, 0, video(0, 0))
    # 5 x 15 patches; the picture is 11 wide, of 2 to 13.
    picture = whole(5, 0, 0)
    for r in range(5):
        for x in range(2, 13):
            box = ((x - 2) / 11, r / 5, (x - 1) / 11, (r + 1) / 5)
            picture.append((r, x % 5, (5, 5), 1 + x // 5, 0, box))
        picture.append((r, 3, (5, 5), 3, 0, (1.0, r / 5, 1.0, (r + 1) / 5)))
    check_layout(layout, 1, picture + video(4, 1))


def internvl_tiles(rows: int, columns: int, group: int, image: int) -> list[tuple[Any, ...]]:
    tokens: list[tuple[Any, ...]] = []
    for i in range(rows):
        for j in range(columns):
            for r, c, grid, _, _, (left, top, right, bottom) in whole(4, 0, 0):
                box = ((j + left) / columns, (i + top) / rows, (j + right) / columns, (i + bottom) / rows)
                tokens.append((r, c, grid, group + i * columns + j, image, box))
    return tokens + whole(4, group + rows * columns, image)


@pytest.mark.parametrize(("rows", "columns"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_layout_of_internvl_finds_out_how_its_tiles_are_arranged(rows: int, columns: int) -> None:
    pictures = [[(16 * rows, 16 * columns), (16, 16)], [(16, 32)]]
    layout = layout_for(FAMILIES["internvl"](pictures))
    check_layout(layout, 0, internvl_tiles(rows, columns, 0, 0) + whole(4, 7, 1))
    check_layout(layout, 1, internvl_tiles(1, 2, 0, 0))


def test_layout_of_internvl_frames() -> None:
    layout = layout_for(prompts_of("internvl", "video"))
    check_layout(layout, 0, [token for f in range(3) for token in whole(4, f, f)])
    check_layout(layout, 1, internvl_tiles(2, 1, 0, 0) + whole(4, 3, 1) + whole(4, 4, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_overlay_brightens_what_the_kept_tokens_see(family: str) -> None:
    prompts = prompts_of(family, "single")
    if family == "llava_next":
        boxes = [token[-1] for token in next_wide(0, 0)]
    elif family == "internvl":
        boxes = [token[-1] for token in internvl_tiles(1, 3, 0, 0)]
    else:
        boxes = [(c / 5, r / 5, (c + 1) / 5, (r + 1) / 5) for r in range(5) for c in range(5)]
        boxes += [
            (min(x, 10) / 11 + (x == 11) / 11, r / 5, min(x + 1, 11) / 11, (r + 1) / 5)
            for r in range(5)
            for x in range(12)
        ]
    assert len(boxes) == int((prompts.inputs["input_ids"] == prompts.visual).sum())
    with pruned(prompts, "random", 9) as pruning:
        generate(prompts, 1)
        width, height = 440, 200
        shown = pruning.overlay(Image.new("RGB", (width, height), (200, 100, 40)))
    bright = torch.zeros(height, width, dtype=torch.bool)
    for token in pruning.kept[0].tolist():
        left, top, right, bottom = (
            round(part * size) for part, size in zip(boxes[token], (width, height) * 2, strict=True)
        )
        bright[top:bottom, left:right] = True
    assert 0 < bright.sum() < width * height
    pixels = torch.tensor(list(shown.tobytes())).view(height, width, 3)
    assert torch.equal(pixels[..., 0] == 200, bright)
    assert torch.equal(pixels[..., 0] == 50, ~bright)


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


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_pictures_encoded_outside_the_block_are_refused(family: str) -> None:
    prompts = prompts_of(family, "ragged")
    if not beams_are_repeated_after_encoding(prompts):
        pytest.skip("this version of transformers takes no encoded pictures")
    text = {name: prompts.inputs[name] for name in ("input_ids", "attention_mask")}
    pictures = {name: t for name, t in prompts.inputs.items() if name not in text}
    with torch.no_grad():
        encoded = prompts.model.get_image_features(**pictures, return_dict=True)
        with pruned(prompts, "fastv", 5), pytest.raises(NotImplementedError, match="inside the block"):
            prompts.model(**text, mm_encoder_outputs={"image": encoded})


def test_pictures_encoded_inside_the_block_are_pruned() -> None:
    prompts = prompts_of("llava_next", "ragged")
    if not beams_are_repeated_after_encoding(prompts):
        pytest.skip("this version of transformers takes no encoded pictures")
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
