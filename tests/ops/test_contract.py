"""The promises of the op contract that concern values, each as one named test over every op and backend.

Memory and threads are in test_contract_memory.py, the dispatcher (fakes, compile, vmap, ...) in test_dispatch.py,
argument errors in test_errors.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from testing import op_samples as samples
from testing.cases import BACKENDS, assert_as_good_as_torch, over_backends, over_dtypes
from testing.op_inputs import features
from testing.op_samples import (
    OPS,
    OUTPUTS,
    SAMPLE_IDS,
    SAMPLES,
    SELECTING,
    SIZES_OF,
    Call,
    Sizes,
    make,
    map_tensors,
    run,
)

over_samples = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=SAMPLE_IDS)
over_ops = pytest.mark.parametrize("op", OPS)
over_selecting = pytest.mark.parametrize("op", SELECTING)
# The references lean on aten, whose matrix products may round differently for another layout or batch: there, and
# only there, float outputs are compared with the tolerance rule instead of bit by bit.
COMPILED = tuple(name for name in BACKENDS if name != "reference")
LAYOUT_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def bits(t: Tensor) -> Tensor:
    """The memory of a tensor as integers: NaN equals NaN, 0.0 differs from -0.0."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(widths[t.element_size()])


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        assert torch.equal(bits(g), bits(w)), f"output {i} differs in {int((bits(g) != bits(w)).sum())} elements"


def assert_same(got: list[Tensor], want: list[Tensor], backend: str) -> None:
    """Bitwise equal; floats of the references up to rounding."""
    if backend != "reference":
        assert_same_bits(got, want)
        return
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True, **(LAYOUT_TOLERANCE if g.is_floating_point() else {}))


def assert_agrees(call: Call, backend: str, scale: float = 1.0) -> list[Tensor]:
    """Integer outputs equal the reference exactly; float outputs err at most twice as much as it does."""
    got, plain = run(call, backend), run(call, "reference")
    exact = run(map_tensors(call, lambda _, t: t.double() if t.is_floating_point() else t), "reference")
    assert len(got) == len(plain)
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if g.is_floating_point() and call.op != "gather_compact":
            finite = e[e.isfinite()].abs()
            assert_as_good_as_torch(g, e, p, scale=max(scale, finite.max().item() if finite.numel() else 0.0))
        else:
            assert g.dtype == p.dtype
            assert torch.equal(g, p), f"output {i} of {call.op} differs from the reference:\n{g}\n{p}"
    return got


def with_floats(call: Call, f) -> Call:
    return map_tensors(call, lambda name, t: f(name, t) if t.is_floating_point() else t)


# --- values ---------------------------------------------------------------------------------------------------------


@over_dtypes
@over_backends
@over_samples
def test_agrees_with_the_reference_in_float64(op: str, name: str, backend: str, dtype: torch.dtype) -> None:
    assert_agrees(make(op, name, dtype=dtype), backend)


@pytest.mark.parametrize("channels", [1, 72, 80, 129])
@over_backends
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if "channels" in SIZES_OF[o] or "attention" in o])
def test_odd_dimensions(op: str, name: str, backend: str, channels: int) -> None:
    assert_agrees(make(op, name, Sizes(channels=channels, tokens=11, k=4)), backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 1), (6, 2), (28, 4)])
@over_backends
@pytest.mark.parametrize("op", ["cross_attention_scores", "attention_scores", "attention_entropy"])
def test_grouped_heads(op: str, backend: str, heads: int, kv_heads: int) -> None:
    call = make(op, "everything", Sizes(heads=heads, kv_heads=kv_heads, tokens=19, channels=8))
    repeated = samples.with_arguments(call, key=call.arguments["key"].repeat_interleave(heads // kv_heads, dim=1))
    assert_agrees(call, backend)
    for grouped, plain in zip(run(call, backend), run(repeated, backend), strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-5, atol=1e-5)


@over_backends
@over_samples
def test_every_size_may_be_zero(op: str, name: str, backend: str) -> None:
    base = Sizes(tokens=7, channels=8, k=3)
    empty = {size: replace(base, **{size: 0}) for size in SIZES_OF[op]}
    if "attention" in op:
        empty["all heads"] = replace(base, heads=0, kv_heads=0)
    empty["batch and tokens"] = replace(base, batch=0, tokens=0)
    for label, sizes in empty.items():
        call = make(op, name, sizes)
        got = assert_agrees(call, backend)
        assert [(tuple(g.shape), g.dtype) for g in got] == samples.promised(call), f"with {label} = 0"


def test_gather_compact_takes_no_tensors() -> None:
    for backend in BACKENDS:
        call = Call("gather_compact", {"tensors": [], "indices": torch.tensor([[0]]), "dims": [], "batch_dims": []})
        assert run(call, backend) == []


@over_backends
@over_samples
def test_one_token(op: str, name: str, backend: str) -> None:
    assert_agrees(make(op, name, Sizes(tokens=1, k=1, listed=1)), backend)
    assert_agrees(make(op, name, Sizes(tokens=1, k=1, listed=1, rows=1, batch=1, channels=1, heads=2)), backend)


@over_backends
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o in SELECTING])
def test_k_beyond_the_tokens_is_padded(op: str, name: str, backend: str) -> None:
    call = make(op, name, Sizes(tokens=11, k=40))
    indices, *_ = got = assert_agrees(call, backend)
    counts = got[OUTPUTS[op].index("count")]
    assert indices.shape == (2, 40)
    assert torch.equal((indices >= 0).sum(-1), counts)
    assert bool((indices.gather(1, counts.unsqueeze(-1)) == -1).all())  # the padding is at the end
    assert bool((counts <= 11).all())


@over_backends
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o in SELECTING])
def test_selected_tokens_are_distinct_and_unmasked(op: str, name: str, backend: str) -> None:
    for k in (0, 1, 5, 37):
        call = make(op, name, Sizes(k=k))
        got = run(call, backend)
        mask = call.arguments.get("mask", torch.ones(2, 37, dtype=torch.bool))
        for b in range(2):
            chosen = got[0][b][got[0][b] >= 0].tolist()
            assert len(set(chosen)) == len(chosen) == got[OUTPUTS[op].index("count")][b]
            assert all(mask[b, i] for i in chosen)
            if samples.ASCENDING[op]:
                assert chosen == sorted(chosen)


@over_backends
@over_selecting
def test_ties_go_to_the_lower_index(op: str, backend: str) -> None:
    """All values equal, and equal zeros of either sign."""
    for value in (1.0, 0.0, -0.0):
        call = with_floats(make(op, sizes=Sizes(k=5)), lambda _, t, value=value: torch.full_like(t, value))
        if op == "select_grouped_topk":
            one_group, budget = torch.zeros(2, 37, dtype=torch.int64), torch.full((2, 1), 5)
            call = samples.with_arguments(call, groups=one_group, budgets=budget)
        zeros = with_floats(
            call,
            lambda _, t: t * torch.tensor([1.0, -1.0]).repeat(t.shape[1])[: t.shape[1]].view(-1, *[1] * (t.dim() - 2)),
        )
        call = samples.with_arguments(call, mask=torch.ones(2, 37, dtype=torch.bool))
        expected = torch.arange(5).expand(2, 5)
        if op == "select_two_tailed":
            call = samples.with_arguments(call, num_low=torch.tensor([0, 2]))
        if op == "spatial_semantic_nms":
            call = samples.with_arguments(call, positions=torch.arange(74.0).view(1, 37, 2).repeat(2, 1, 1) * 9)
        assert torch.equal(run(call, backend)[0], expected), f"all {value}"
        if value == 0.0 and op not in ("mask_to_indices", "select_two_tailed"):
            assert torch.equal(run(zeros, backend)[0], run(call, backend)[0]), "zeros of alternating sign"


@over_backends
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o in SELECTING])
def test_minus_zero_equals_zero(op: str, name: str, backend: str) -> None:
    call = make(op, name)
    negated = with_floats(call, lambda _, t: torch.where(t == 0, -0.0, t))
    got, want = run(negated, backend), run(call, backend)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@over_backends
@over_dtypes
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o in SELECTING and o != "mask_to_indices"])
def test_nan_is_worse_than_every_number(op: str, name: str, backend: str, dtype: torch.dtype) -> None:
    """NaN among the values that are compared: scores, or the energy of repulsion sampling."""
    call = make(op, name, Sizes(k=34), dtype)
    spoiled = {n for n in ("scores", "text_scores", "energy") if n in call.arguments}
    for n in spoiled or ():
        values = call.arguments[n].clone()
        values[0, 3::5] = torch.nan
        values[1, 1] = torch.nan
        call = samples.with_arguments(call, **{n: values})
    got = assert_agrees(call, backend)
    if op in ("select_topk", "spatial_semantic_nms") and name != "hard_grouped":
        few = run(samples.with_arguments(call, k=20), backend)[0]
        assert not bool(call.arguments["scores"].gather(1, few.clamp_min(0)).isnan().any())
        assert bool((got[0] == 3).any())  # with budget left, NaN tokens are taken too


@over_backends
@over_dtypes
@pytest.mark.parametrize("op", [op for op in OPS if "channels" in SIZES_OF[op]])
def test_a_nan_feature_is_treated_as_the_reference_does(op: str, backend: str, dtype: torch.dtype) -> None:
    for name in samples.FACTORIES[op]:
        call = make(op, name, dtype=dtype)
        if "features" in call.arguments:
            spoiled = call.arguments["features"].clone()
            spoiled[0, 4, 1] = torch.nan
            call = samples.with_arguments(call, features=spoiled)
        assert_agrees(call, backend)


@over_backends
@over_dtypes
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o in SELECTING])
def test_infinities_are_ordinary_numbers(op: str, name: str, backend: str, dtype: torch.dtype, value: float) -> None:
    call = make(op, name, dtype=dtype)
    for n in ("scores", "text_scores", "energy"):
        if n in call.arguments:
            values = call.arguments[n].clone()
            values[0, 2] = values[0, 30] = values[1, 5] = value
            call = samples.with_arguments(call, **{n: values})
    assert_agrees(call, backend)


@over_backends
@over_dtypes
def test_zero_vectors_have_cosine_zero(backend: str, dtype: torch.dtype) -> None:
    zeros, some = torch.zeros(2, 6, 8, dtype=dtype), features(2, 6, 8, dtype=dtype, seed=0)
    cosine = run(Call("cosine_scores", {"features": zeros, "queries": some}), backend)[0]
    assert torch.equal(cosine, torch.zeros_like(cosine))
    cosine = run(Call("cosine_scores", {"features": some, "queries": zeros}), backend)[0]
    assert torch.equal(cosine, torch.zeros_like(cosine))
    listed = torch.tensor([[0, 1], [2, -1]])
    call = Call("contrastive_scores", {"features": zeros, "anchor_indices": listed, "reference_indices": listed})
    assert torch.equal(run(call, backend)[0], torch.zeros_like(cosine))
    for first in ("outlier", "isolated", "index"):
        call = Call("repulsion_sample", {"features": zeros, "k": 4, "first": first})
        assert run(call, backend)[0].tolist() == [[0, 1, 2, 3]] * 2
    # Cosine 0 and sigma_semantic 1: w = exp(-1/2) at distance 0.
    positions, scores = torch.zeros(2, 6, 2), torch.tensor([[6.0, 5, 4, 3, 2, 1]] * 2)
    call = Call(
        "spatial_semantic_nms",
        {"scores": scores, "features": zeros, "positions": positions, "k": 2, "sigma_semantic": 1.0},
    )
    indices, values, _ = run(call, backend)
    assert indices.tolist() == [[0, 1]] * 2
    torch.testing.assert_close(values, torch.tensor([[6.0, 5 * (1 - 2.718281828459045**-0.5)]] * 2))
    query, key = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.ones(1, 1, 4, 8, dtype=dtype)
    lse = run(Call("attention_entropy", {"query": query, "key": key, "cosine": True}), backend)[1]
    torch.testing.assert_close(lse.float(), torch.full((1, 1, 1), 4.0).log())


@over_backends
@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in SAMPLES if o != "paired_cosine"])  # which has no mask
def test_nothing_valid(op: str, name: str, backend: str) -> None:
    """Every mask all False, every index list all -1."""
    call = map_tensors(
        make(op, name),
        lambda n, t: (
            torch.full_like(t, -1) if n in samples.INDEX_INPUTS else torch.zeros_like(t) if t.dtype == torch.bool else t
        ),
    )
    sizes = Sizes(rows=call.arguments["query"].shape[2]) if "query" in call.arguments else Sizes()
    masks = {n: t for n, t in samples.optional_tensors(op, sizes).items() if t.dtype == torch.bool}
    call = samples.with_arguments(call, **{n: torch.zeros_like(t) for n, t in masks.items()})
    got = assert_agrees(call, backend)
    if op == "gather_compact":
        assert all(not bool(g.any()) for g in got)
        return
    empty = {"index": -1, "count": 0, "score": 0, "value": 0}
    expected = [empty[kind] for kind in OUTPUTS[op]]
    if op in ("cross_attention_scores", "attention_entropy"):
        expected[-1] = -torch.inf
    if op == "select_mixture":
        got, expected = got[:2], expected[:2]  # num_text stays b + r*
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, torch.full_like(g, e))


# --- samples of a batch, and padding --------------------------------------------------------------------------------


@over_backends
@over_samples
def test_a_sample_does_not_depend_on_its_batch(op: str, name: str, backend: str) -> None:
    call = make(op, name, Sizes(batch=3))
    together = run(call, backend)
    for b in range(3):
        alone = run(samples.one_sample(call, b), backend)
        part = [t.narrow(d, b, 1) for t, d in zip(together, samples.output_batch_dims(call), strict=True)]
        assert_same(alone, part, backend)


PADDABLE = {  # op -> (the token dimension of its tensors, the mask that hides padding)
    "score_entropy": ({"scores": 1}, "mask"),
    "select_topk": ({"scores": 1}, "mask"),
    "select_grouped_topk": ({"scores": 1, "groups": 1}, "mask"),
    "select_two_tailed": ({"scores": 1}, "mask"),
    "select_mixture": ({"text_scores": 1, "visual_scores": 1}, "mask"),
    "mask_to_indices": ({}, "mask"),
    "repulsion_sample": ({"features": 1, "positions": 1, "energy": 1}, "mask"),
    "spatial_semantic_nms": ({"scores": 1, "features": 1, "positions": 1, "groups": 1}, "mask"),
    "dpp_sample": ({"features": 1, "quality": 1}, "mask"),
    "coverage_sample": ({"similarity": 2, "quality": 1}, "mask"),
    "density_peaks": ({"features": 1}, "mask"),
    "merge_tokens": ({"values": 1, "keys": 1, "weights": 1, "assignment": 1}, "mask"),
    "cosine_scores": ({"queries": 1}, "query_mask"),
    "attention_entropy": ({"key": 2}, "key_mask"),
    "cross_attention_scores": ({"key": 2}, "key_mask"),
    "attention_scores": ({"key": 2}, "key_mask"),
}


def _padded(t: Tensor, dim: int, fill: float) -> Tensor:
    shape = list(t.shape)
    shape[dim] = 6
    return torch.cat([t, t.new_full(shape, fill)], dim)


@pytest.mark.parametrize("fill", [7.0, torch.nan, torch.inf])
@over_backends
@pytest.mark.parametrize(
    ("op", "name"), [(o, n) for o, n in SAMPLES if o in PADDABLE and n not in ("one_row_causal", "assigned")]
)
def test_masked_padding_changes_nothing(op: str, name: str, backend: str, fill: float) -> None:
    """Whatever stands in the padding, NaN included."""
    dims, mask = PADDABLE[op]
    call = make(op, name)
    size = 5 if mask == "query_mask" else 37
    shown = call.arguments.get(mask, torch.ones(2, size, dtype=torch.bool))
    longer = map_tensors(
        call, lambda n, t: _padded(t, dims[n], fill if t.is_floating_point() else 1) if n in dims else t
    )
    longer = samples.with_arguments(longer, **{mask: _padded(shown, 1, 0)})
    got, want = run(longer, backend), run(call, backend)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.shape != w.shape:  # scores of the padded keys themselves
            assert bool((g[..., 37:] == (-1 if OUTPUTS[op][i] == "index" else 0)).all())
            g = g[..., :37]
        torch.testing.assert_close(
            g, w, **(LAYOUT_TOLERANCE if g.is_floating_point() else {}), msg=f"output {i}:\n{g}\n{w}"
        )
