"""PyramidDrop's stage against the float64 transcription of its attention, and its schedule on models of any depth."""

import pytest

from testing.cases import over_backends
from tests.methods.inputs import (
    assert_close,
    assert_selected,
    batch,
    decided,
    most_attended,
    over_dtypes,
    prompt,
    ragged,
    row_scores,
)
from tokenprune_kernels.methods import Method, get_method, pyramiddrop


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 9, 30, 33])
def test_pyramiddrop(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: most_attended(p, k, "last"))
    kept = pyramiddrop(p.query[None], p.key[None], k, key_indices=p.indices[None], backend=backend)
    assert_selected(kept, [expected])
    assert_close(kept.details["attention"][0], row_scores(p, "last"))


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 8, 20, 40])
def test_padding_changes_nothing(k, dtype, backend):
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [most_attended(p, k, "last") for p in ps])
    b = batch(prompts)
    assert_selected(pyramiddrop(b.query, b.key, k, **b.attention, backend=backend), expected)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (32, {8: 0.5, 16: 0.25, 24: 0.125}),
        (40, {10: 0.5, 20: 0.25, 30: 0.125}),
        (28, {7: 0.5, 14: 0.25, 21: 0.125}),
        (3, {1: 0.25, 2: 0.125}),  # layers 0 and 1 are both layer 1, where the later share counts
    ],
)
def test_the_schedule_is_at_the_same_parts_of_every_model(depth, expected):
    assert get_method("pyramiddrop").scheduled(depth) == expected
    assert Method("plain", get_method("pyramiddrop").stages).scheduled(depth) == {}
