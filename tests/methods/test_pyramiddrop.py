"""PyramidDrop's schedule on models of any depth; its stage is in test_most_attended.py."""

import pytest

from tokenprune_kernels.methods import Method, get_method


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
