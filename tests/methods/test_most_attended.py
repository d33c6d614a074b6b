"""FastV, PyramidDrop's stage and STS's semantics against one transcription: what rows attend to most is kept."""

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
from tokenprune_kernels.methods import fastv, pyramiddrop, sts_semantics

over_methods = pytest.mark.parametrize(
    ("method", "how"), [(fastv, "last"), (pyramiddrop, "last"), (sts_semantics, "mean")]
)


@over_methods
@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 9, 30, 33])
def test_keeps_what_the_instruction_attends_to(method, how, k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: most_attended(p, k, how))
    kept = method(p.query[None], p.key[None], k, key_indices=p.indices[None], backend=backend)
    assert_selected(kept, [expected])
    assert_close(kept.details["attention"][0], row_scores(p, how))
    if how == "last":
        of_last = method(p.query[None, :, -1:], p.key[None], k, key_indices=p.indices[None], backend=backend)
        assert of_last.indices.tolist() == kept.indices.tolist()


@over_methods
@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 8, 20, 40])
def test_padding_changes_nothing(method, how, k, dtype, backend):
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [most_attended(p, k, how) for p in ps])
    b = batch(prompts)
    assert_selected(method(b.query, b.key, k, **b.attention, backend=backend), expected)
