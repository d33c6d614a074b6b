"""What every method promises: legal sizes, no gradient, no host synchronisation, one graph under torch.compile."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from testing.cases import BACKENDS, over_backends
from tests.methods.inputs import Batch, arguments, batch, prompt, ragged
from tokenprune_kernels import methods
from tokenprune_kernels.methods import Selection, Stage

Method = Callable[[Batch, int, str | None], Selection]


def _call(stage: Stage) -> Method:
    function, names = stage.function, stage.arguments

    def call(b: Batch, k: int, on: str | None) -> Selection:
        given = arguments(b)
        return function(k=k, backend=on, **{name: given[source] for name, source in names.items()})

    return call


STAGES = [stage for name in methods.method_names() for stage in methods.get_method(name).stages]
METHODS = {stage.name: _call(stage) for stage in STAGES}


def _of_merging(kept: Selection) -> list[torch.Tensor]:
    """What a method gives that merges; nothing of the others."""
    fields = (kept.merged, kept.sizes, kept.assignment)
    present = [t for t in fields if t is not None]
    assert len(present) in (0, len(fields))
    return present


over_methods = pytest.mark.parametrize("name", METHODS)


def _without_visual_tokens() -> Batch:
    """Three text tokens and the question, but no image."""
    return batch([prompt(0, torch.float32, grid=(0, 0))] * 2)


def test_every_method_is_covered():
    registry = {"get_method", "method_names", "register_method", "unregister_method"}
    assert {n for n in methods.__all__ if inspect.isfunction(getattr(methods, n))} - registry == set(METHODS)
    assert set(arguments(batch([prompt(0, torch.float32)]))) == set(methods.ARGUMENTS)


@over_methods
@over_backends
@pytest.mark.parametrize("k", [0, 1, 5])
def test_without_visual_tokens_nothing_is_selected(name, k, backend):
    kept = METHODS[name](_without_visual_tokens(), k, backend)
    assert kept.indices.tolist() == [[-1] * k] * 2
    assert kept.counts.tolist() == [0, 0]


@over_methods
@over_backends
def test_a_sample_without_visual_tokens_in_a_batch(name, backend):
    """Its row is padding only; the others are selected as usual."""
    prompts = [prompt(0, torch.float32), prompt(1, torch.float32, grid=(0, 0)), prompt(2, torch.float32, grid=(2, 3))]
    kept = METHODS[name](batch(prompts), 9, backend)
    assert kept.counts.tolist() == [9, 0, 6]
    assert kept.indices[1:].tolist() == [[-1] * 9, [*range(6), -1, -1, -1]]


@over_methods
@over_backends
def test_an_empty_batch(name, backend):
    b = batch([prompt(0, torch.float32)])
    none = Batch(*(t[:0] for t in b[:-1]), attention={n: t[:0] for n, t in b.attention.items()})
    kept = METHODS[name](none, 4, backend)
    assert kept.indices.shape == (0, 4)
    assert kept.counts.shape == (0,)


@over_methods
@over_backends
def test_no_gradient_and_inputs_untouched(name, backend):
    b = batch(ragged(0, torch.float32))
    tensors = [*b[:-1], *b.attention.values()]
    before = [t.clone() for t in tensors]
    for t in tensors:
        t.requires_grad_(t.is_floating_point())
    kept = METHODS[name](b, 7, backend)
    made = [*kept[:2], *kept.details.values(), *_of_merging(kept)]
    assert not any(t.requires_grad and t is not b.saliency for t in made)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@over_methods
@over_backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_no_value_spoils_a_selection_or_another_sample(name, value, backend):
    """In a token of each input, in all of a sample, and in tokens that are none, which lie between real ones."""
    k, clean = 7, batch([prompt(i, torch.float32, (3, 4)) for i in range(4)])
    clean.mask[:, ::5] = False
    clean.attention["key_indices"][~clean.mask] = -1
    b = clean._replace(**{n: getattr(clean, n).clone() for n in ("query", "key", "features", "text", "saliency")})
    for of_sample in (b.features[0, 1], b.saliency[0, 2:3], b.key[0, :, 6], b.query[0, :, 0], b.text[0, 0]):
        of_sample[:] = value
    for t in (b.features, b.saliency):
        t[1] = value
        t[~b.mask] = value
    for t in (b.query, b.key, b.text, b.saliency):
        t[2] = value
    torch.manual_seed(0)
    kept = METHODS[name](b, k, backend)
    torch.manual_seed(0)
    expected = METHODS[name](clean, k, backend)

    assert kept.counts.tolist() == [k] * 4
    for row, real in zip(kept.indices.tolist(), b.mask, strict=True):
        assert row == sorted({*row})
        assert {*row} <= {*real.nonzero().flatten().tolist()}
    for got, want in zip([kept.indices, *_of_merging(kept)], [expected.indices, *_of_merging(expected)], strict=True):
        assert torch.equal(got[3], want[3])


class _NoSynchronisation(TorchDispatchMode):
    """Raises where a GPU would have to wait for the host to read a value or to learn a size."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "boolean index"
        return func(*args, **(kwargs or {}))


@over_methods
@pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="the references read index values; the compiled library is not loaded"
)
def test_no_host_synchronisation(name):
    b = batch(ragged(0, torch.float32))
    with _NoSynchronisation():
        METHODS[name](b, 7, "cpu")


def test_the_synchronisation_check_catches_one():
    with pytest.raises(AssertionError, match="waits for the device"), _NoSynchronisation():
        torch.ones(3).sum().item()


@over_methods
def test_compiles_to_one_graph_for_all_sizes(name):
    """Dynamic shapes: the second batch has other numbers of samples, tokens and rows, and nothing is traced again."""
    torch._dynamo.reset()
    traced = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal traced
        traced += 1
        return graph

    compiled = torch.compile(METHODS[name], fullgraph=True, dynamic=True, backend=counting)
    # No two sizes of the first batch are equal by chance: dynamo would take them for one and the same.
    for grids in (((5, 6), (3, 4), (2, 2)), ((4, 7), (6, 6), (2, 9), (1, 5), (3, 3))):
        b = batch([prompt(i, torch.float32, grid) for i, grid in enumerate(grids)])
        torch.manual_seed(0)
        expected = METHODS[name](b, 7, None)
        torch.manual_seed(0)
        kept = compiled(b, 7, None)
        assert kept.indices.tolist() == expected.indices.tolist()
        assert kept.counts.tolist() == expected.counts.tolist()
        assert kept.details.keys() == expected.details.keys()
        assert all(map(torch.equal, _of_merging(kept), _of_merging(expected)))
    assert traced == 1


@pytest.mark.parametrize("name", ["coast", "adaptprune"])
def test_compiles_through_the_fakes(name):
    """The ops' fakes and the glue trace to aten under ahead-of-time autograd."""
    torch._dynamo.reset()
    b = batch(ragged(0, torch.float32))
    kept = torch.compile(METHODS[name], fullgraph=True, backend="aot_eager")(b, 7, None)
    assert kept.indices.tolist() == METHODS[name](b, 7, None).indices.tolist()


@over_methods
def test_rejects_bad_budgets(name):
    b = batch([prompt(0, torch.float32)])
    with pytest.raises(ValueError, match="k must be non-negative"):
        METHODS[name](b, -1, None)
    with pytest.raises(ValueError, match=r"k must lie in \(0, 1\] where it is a float"):
        METHODS[name](b, 2.0, None)
