"""Calls that users guess: other layouts, budgets, integer types and containers give what the plain call gives, or an
error that says what to type."""

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenprune_kernels as tp
from testing import op_samples as samples
from testing.op_samples import Sizes, make, outputs, positional, with_arguments
from tests.ops.test_errors import RICHEST
from tokenprune_kernels import _op as described
from tokenprune_kernels._op import TensorKind

ATTENTION = ("cross_attention_scores", "attention_scores", "attention_entropy")
over_attention = pytest.mark.parametrize("op", ATTENTION)
over_selecting = pytest.mark.parametrize("op", samples.SELECTING)
SMALL = Sizes(batch=4, tokens=11, channels=8, k=4)


def call(op: str, arguments: dict[str, Any], **more: Any) -> list[Tensor]:
    args, kwargs = positional(samples.Call(op, arguments))
    return outputs(getattr(tp, op)(*args, **kwargs, **more))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True, rtol=0, atol=0)


def rich(op: str) -> dict[str, Any]:
    """A call with every optional tensor of the op that goes with the others."""
    arguments: dict[str, Any] = make(op, RICHEST[op], SMALL).arguments
    return arguments


# --- layouts ----------------------------------------------------------------------------------------------------------


def swapped(t: Tensor) -> Tensor:
    """[B, L, H, D], dense as FlashAttention has it."""
    return t.transpose(1, 2).contiguous()


@over_attention
def test_flash_attentions_layout_gives_the_same(op: str) -> None:
    a = make(op, "everything" if "everything" in samples.FACTORIES[op] else "plain").arguments
    other = {**a, "query": swapped(a["query"]), "key": swapped(a["key"])}
    assert_same(call(op, other, layout="blhd"), call(op, a))
    assert_same(call(op, a, layout="bhld"), call(op, a))


@over_attention
def test_a_layout_is_a_view(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the backend shares the caller's memory."""
    from tokenprune_kernels import _backend

    a = make(op).arguments
    seen: list[Tensor] = []
    namespace = _backend.implementation(None, a["query"], op)
    plain = getattr(namespace, op)

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: seen.extend(args[:2]) or plain(*args, **kwargs)

    monkeypatch.setattr(_backend, "implementation", lambda *_: Spy())
    query, key = swapped(a["query"]), swapped(a["key"])
    call(op, {**a, "query": query, "key": key}, layout="blhd")
    assert [t.data_ptr() for t in seen] == [query.data_ptr(), key.data_ptr()]


@over_attention
def test_wrong_layouts_are_named(op: str) -> None:
    a = make(op).arguments
    for layout, got in (("bshd", "'bshd'"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"tokenprune::{op}: layout must be one of bhld, blhd, got {got}"):
            call(op, a, layout=layout)
    with pytest.raises(ValueError, match=rf"{op}: key must have shape \[B, L, H, D\].*, got \[2, 3, 4\]"):
        call(op, {**a, "key": torch.zeros(2, 3, 4)}, layout="blhd")
    with pytest.raises(TypeError, match=rf"{op}: query must be a tensor, got list"):
        call(op, {**a, "query": [1.0]}, layout="blhd")


LOOKS_SWAPPED = 'key looks like [B, N, Hkv, D]: pass layout="blhd", or key.transpose(1, 2)'


@pytest.mark.parametrize(("heads", "tokens", "warns"), [
    (576, 32, True), (129, 8, True), (33, 32, True), (18, 2, True),  # no model has these
    (128, 8, False), (32, 3, False), (16, 3, False), (12, 1, False), (33, 40, False), (576, 576, False),
])  # fmt: skip
def test_shapes_that_look_swapped_warn(heads: int, tokens: int, warns: bool) -> None:
    """By the rule of the documentation: more heads than tokens, and more than 128, or above 16 no multiple of 4."""
    query, key = torch.randn(1, heads, 2, 4), torch.randn(1, heads, tokens, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in ("cross_attention_scores", "attention_entropy"):
            getattr(tp, op)(query, key)
    said = [str(w.message) for w in caught]
    assert [LOOKS_SWAPPED in text for text in said] == [True, True] * warns
    assert all(w.filename == __file__ for w in caught)
    assert all("no model has more than 128 heads, or more than 16 that are no multiple of 4" in text for text in said)


def test_an_error_about_heads_says_that_they_look_swapped() -> None:
    query, key = torch.randn(1, 64, 32, 4), torch.randn(1, 576, 32, 4)
    for op in (tp.cross_attention_scores, torch.ops.tokenprune.cross_attention_scores):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"multiple of Hkv = 576, got 64; " + re.escape(LOOKS_SWAPPED)
        ):
            op(query, key)
        with pytest.raises((ValueError, RuntimeError), match=r"multiple of Hkv = 4, got 6$|got 6\n"):
            op(query[:, :6], key[:, :4])


def test_layouts_compile() -> None:
    torch._dynamo.reset()
    a = make("cross_attention_scores").arguments
    compiled = torch.compile(tp.cross_attention_scores, fullgraph=True, dynamic=True, backend="eager")
    got = compiled(swapped(a["query"]), swapped(a["key"]), layout="blhd")
    assert_same(list(got), list(tp.cross_attention_scores(a["query"], a["key"])))


# --- budgets ----------------------------------------------------------------------------------------------------------


@over_selecting
@pytest.mark.parametrize("spelled", [np.int64(4), np.int32(4), torch.tensor(4), 0.37, np.float32(0.37), [4] * 4])
def test_one_budget_in_other_words(op: str, spelled: Any) -> None:
    """0.37 of 11 tokens are 4."""
    name, a = str(samples.count_of(op)), rich(op)
    assert_same(call(op, {**a, name: spelled}), call(op, {**a, name: 4}))


@over_selecting
@pytest.mark.parametrize("kind", ["list", "tuple", "tensor", "array", "shares"])
def test_a_budget_for_each_sample(op: str, kind: str) -> None:
    """Sample b is what a call with its own number gives, and lists end in -1, values in 0."""
    name, a = str(samples.count_of(op)), rich(op)
    a.pop("budgets", None) if op == "select_topk" else None
    numbers = [2, 5, 0, 2]
    given: Any = {
        "list": numbers,
        "tuple": tuple(numbers),
        "tensor": torch.tensor(numbers, dtype=torch.int32),
        "array": np.array(numbers),
        "shares": [2, 0.45, 0, 0.2],  # of 11 tokens
    }[kind]
    together = call(op, {**a, name: given})
    for b, k in enumerate(numbers):
        alone = call(op, samples.one_sample(samples.Call(op, {**a, name: k}), b).arguments)
        for got, want in zip(together, alone, strict=True):
            row, filler = got[b : b + 1], 0 if got.is_floating_point() else -1
            cut = [slice(0, size) for size in want.shape]
            torch.testing.assert_close(row[tuple(cut)], want, equal_nan=True, rtol=0, atol=0)
            if got.dim() > 1:
                assert bool((row[:, want.shape[1] :] == filler).all())
    index = next(t for t in together if t.dtype == torch.int64 and t.dim() == 2)
    assert index.shape == (4, 5)


@over_selecting
def test_budgets_that_are_none(op: str) -> None:
    name, a = str(samples.count_of(op)), rich(op)
    a.pop("budgets", None) if op == "select_topk" else None
    wrong: list[tuple[Any, type[Exception], str]] = [
        (True, TypeError, rf"{name} must be an int, a share .*, got bool"),
        (2.5, ValueError, rf"{name} must lie in \(0, 1\] where it is a float, a share of the tokens, got 2\.5$"),
        (25.0, ValueError, rf"{name} must lie in .*, got 25\.0; type {name}=25 for a number of tokens"),
        (-0.5, ValueError, rf"{name} must lie in \(0, 1\]"),
        (float("nan"), ValueError, rf"{name} must lie in \(0, 1\]"),
        ([1, 2], ValueError, rf"{name} must have one number per sample \(B = 4\), got 2"),
        ([1, 2, "3", 4], TypeError, rf"{name} must have an int or a share .* per sample, got str"),
        ([1, 2, True, 4], TypeError, rf"{name} must have an int or a share .* per sample, got bool"),
        ([1, 2, -3, 4], ValueError, rf"{name} must be non-negative, got -3"),
        (torch.ones(2, 2), TypeError, rf"{name} must be an int, a share"),
        (
            torch.ones(4, device="meta"),
            TypeError,
            rf"{name} must be known to the host, .* on meta; type {name}.tolist\(\)",
        ),
        ("3", TypeError, rf"{name} must be an int, a share .*, got str"),
    ]
    for value, error, message in wrong:
        with pytest.raises(error, match=rf"tokenprune::{op}: {message}"):
            call(op, {**a, name: value})


def test_two_budgets_for_each_sample_are_refused() -> None:
    scores = torch.rand(2, 5)
    with pytest.raises(ValueError, match="budgets must be None where k has a number per sample, got both"):
        tp.select_topk(scores, [1, 2], budgets=torch.tensor([1, 2]))


def test_a_batch_without_samples_has_no_budgets() -> None:
    assert tp.select_topk(torch.zeros(0, 5), [])[0].shape == (0, 0)


def test_every_tensor_has_a_row_for_every_budget() -> None:
    """Taking rows must not hide that a mask has too many."""
    with pytest.raises(ValueError, match=r"mask must have shape \[B, N\] = \[2, 5\], got \[3, 5\]"):
        tp.dpp_sample(torch.rand(2, 5, 3), [1, 2], mask=torch.ones(3, 5, dtype=torch.bool))


def test_budgets_for_each_sample_launch_select_topk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune_kernels import _backend

    served: list[Any] = []
    monkeypatch.setattr(_backend, "_serve", lambda op, backend, values: served.append(values))
    tp.select_topk(torch.rand(3, 5), [1, 2, 3])
    ((_, k, mask, largest, budgets),) = served
    assert (k, mask, largest, budgets.tolist()) == (3, None, True, [1, 2, 3])


def test_shares_and_lists_compile() -> None:
    torch._dynamo.reset()
    features = torch.rand(2, 12, 3)
    for k in (0.25, [2, 5], 3):
        compiled = torch.compile(lambda x, k=k: tp.repulsion_sample(x, k), fullgraph=True, backend="eager")
        assert_same(list(compiled(features)), list(tp.repulsion_sample(features, k)))


def test_mask_to_indices_has_room_for_all_tokens_by_default() -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert_same(list(tp.mask_to_indices(mask)), list(tp.mask_to_indices(mask, 4)))


# --- integer types ----------------------------------------------------------------------------------------------------

INTEGER_INPUTS = [
    (op, a.name)
    for op in samples.OPS
    for a in described.OPS[op].arguments
    if isinstance(a.kind, TensorKind) and a.kind.dtypes == (torch.int64,)
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize(("op", "name"), INTEGER_INPUTS, ids=[f"{op}-{name}" for op, name in INTEGER_INPUTS])
def test_narrower_integers_are_taken_for_int64(op: str, name: str, dtype: torch.dtype) -> None:
    a = {**samples.optional_tensors(op, SMALL), **rich(op)}
    a[name] = a[name].clamp(-100, 100)
    assert_same(call(op, {**a, name: a[name].to(dtype)}), call(op, a))


@pytest.mark.parametrize(("op", "name"), INTEGER_INPUTS, ids=[f"{op}-{name}" for op, name in INTEGER_INPUTS])
def test_masks_and_floats_are_no_indices(op: str, name: str) -> None:
    a = {**samples.optional_tensors(op, SMALL), **rich(op)}
    for dtype, instead in (
        (torch.bool, rf"type mask_to_indices\({name}\)\[0\]"),
        (torch.uint8, rf"type {name}\.long\(\)"),
        (torch.float32, rf"type {name}\.long\(\)"),
    ):
        with pytest.raises(TypeError, match=rf"tokenprune::{op}: {name} must be int64, got \w+; {instead}"):
            call(op, {**a, name: a[name].to(dtype)})


def test_indices_to_mask_takes_narrower_integers() -> None:
    indices = torch.tensor([[0, 120, -1]], dtype=torch.int8)
    assert torch.equal(tp.indices_to_mask(indices, np.int64(300)), tp.indices_to_mask(indices.long(), 300))


def test_numbers_of_numpy_are_numbers() -> None:
    a = make("repulsion_sample", "plain").arguments
    numbers = {"sigma": np.float32(0.5), "exponent": np.int64(2)}
    same = {"sigma": 0.5, "exponent": 2.0}
    for potential in ("riesz", "gaussian"):
        assert_same(call("repulsion_sample", {**a, "potential": potential, **numbers}),
                    call("repulsion_sample", {**a, "potential": potential, **same}))  # fmt: skip
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    scaled = tp.cross_attention_scores(query, key, scale=np.float32(0.25))
    assert_same(list(scaled), list(tp.cross_attention_scores(query, key, scale=0.25)))
    assert_same(
        list(tp.density_peaks(key[:, 0], 2, neighbors=np.int64(3))), list(tp.density_peaks(key[:, 0], 2, neighbors=3))
    )
    for wrong in (True, torch.tensor(0.5)):
        with pytest.raises(TypeError, match="sigma must be a number, got"):
            call("repulsion_sample", {**a, "sigma": wrong})
    with pytest.raises(TypeError, match="neighbors must be an int, got bool"):
        tp.density_peaks(key[:, 0], 2, neighbors=True)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["repulsion_sample", "spatial_semantic_nms"])
def test_positions_may_be_integers_or_those_of_every_sample(op: str) -> None:
    a = rich(op)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(3))[:11]
    whole = grid.float().expand(4, 11, 2)
    want = call(op, {**a, "positions": whole})
    for positions in (whole.long(), whole.to(torch.uint8), grid.float(), grid, grid.int()):
        assert_same(call(op, {**a, "positions": positions}), want)
    with pytest.raises(ValueError, match=rf"tokenprune::{op}: positions must have shape \[B, N, "):
        call(op, {**a, "positions": grid[:10]})
    with pytest.raises(TypeError, match=rf"tokenprune::{op}: positions must be float16, .*, got bool"):
        call(op, {**a, "positions": grid.bool()})


# --- masks ------------------------------------------------------------------------------------------------------------

MASKS = [
    (op, a.name)
    for op in samples.OPS
    for a in described.OPS[op].arguments
    if isinstance(a.kind, TensorKind) and a.kind.dtypes == (torch.bool,)
]
OF_TOKENS = (
    r"pass the mask of the tokens alone, as attention_mask\.bool\(\) is before a model makes four dimensions of it"
)


@pytest.mark.parametrize(("op", "name"), MASKS, ids=[f"{op}-{name}" for op, name in MASKS])
def test_what_is_no_mask_is_told_what_would_be(op: str, name: str) -> None:
    a = {**samples.optional_tensors(op, SMALL), **rich(op)}
    mask = a[name]
    for wrong, got in (
        (mask.long(), rf"must be bool, got int64; type {name}\.bool\(\)"),
        (mask.to(torch.uint8), rf"must be bool, got uint8; type {name}\.bool\(\)"),
        (mask.float(), rf"must be bool, got float32; type {name} > 0, or {name} == 0 where -inf hides"),
        (mask.float()[:, None, None], rf"must be bool, got float32; {OF_TOKENS}"),
        (mask[:, None, None], rf"must have shape .*, got \[4, 1, 1, \d+\]; {OF_TOKENS}"),
        (mask.tolist(), rf"must be a tensor.*, got list; type torch\.as_tensor\({name}\)"),
        (mask.numpy(), rf"must be a tensor.*, got ndarray; type torch\.as_tensor\({name}\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"tokenprune::{op}: {name} {got}"):
            call(op, {**a, name: wrong})


def test_a_mask_without_samples_is_told_how_to_be_shared() -> None:
    scores = torch.rand(3, 5)
    with pytest.raises(
        ValueError, match=r"mask must have shape \[B, N\] = \[3, 5\], got \[5\]; type mask\.expand\(3, -1\)"
    ):
        tp.select_topk(scores, 2, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores must have shape \[B, N\], got \[5\]; type scores\.unsqueeze\(0\)"):
        tp.select_topk(scores[0], 2)
    with pytest.raises(
        ValueError, match=r"query must have shape .*, got \[2, 6, 64\]; type query\.unflatten\(-1, \(heads, -1\)\)"
    ):
        tp.attention_entropy(torch.rand(2, 6, 64), torch.rand(2, 4, 6, 16))


# --- other layouts of memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_told_how_to_be_padded(layout: torch.layout) -> None:
    ragged = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)], layout=layout)
    instead = (
        r"features must be a dense tensor, got a nested one; type torch\.nested\.to_padded_tensor\(features, 0\.0\)"
    )
    with pytest.raises(TypeError, match=instead):
        tp.dpp_sample(ragged, 2)
    padded = torch.nested.to_padded_tensor(ragged, 0.0)
    assert tp.dpp_sample(padded, 2, mask=torch.arange(5) < torch.tensor([[3], [5]]))[2].tolist() == [2, 2]


# --- the plain call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), samples.SAMPLES, ids=samples.SAMPLE_IDS)
def test_a_plain_call_converts_nothing(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs a few microseconds happens only where the fast check says no."""
    from tokenprune_kernels import _backend

    def refuse(*_: Any) -> None:
        raise AssertionError("the fast check said no")

    monkeypatch.setattr(_backend, "converted", refuse)
    call(op, with_arguments(make(op, name)).arguments)


FLAGS = [(op, a.name) for op in samples.OPS for a in described.OPS[op].arguments if a.type == "bool"]


@pytest.mark.parametrize(("op", "name"), FLAGS, ids=[f"{op}-{name}" for op, name in FLAGS])
def test_flags_are_true_or_false(op: str, name: str) -> None:
    """The dispatcher takes None for False, and says of a string which C++ type it is not."""
    a = rich(op)
    for one, zero in ((1, 0), (np.True_, np.False_)):
        assert_same(call(op, {**a, name: one}), call(op, {**a, name: True}))
        assert_same(call(op, {**a, name: zero}), call(op, {**a, name: False}))
    for value, got in ((None, "None"), ("no", "'no'")):
        with pytest.raises(TypeError, match=rf"tokenprune::{op}: {name} must be True or False, got {got}"):
            call(op, {**a, name: value})


def test_a_scale_is_a_number() -> None:
    query, key = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 5, 4)
    assert_same(list(tp.attention_entropy(query, key, scale=1)), list(tp.attention_entropy(query, key, scale=1.0)))
    for value in ("auto", True, [1.0]):
        with pytest.raises(TypeError, match=r"attention_entropy: scale must be a number or None, got"):
            tp.attention_entropy(query, key, scale=value)
