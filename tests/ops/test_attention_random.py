"""Random calls of the attention ops against the reference in float64, on every backend."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.cases import dtypes_of, interpreted, over_backends
from tests.ops.test_attention import HEADS, check, inputs


@over_backends
@settings(deadline=None, max_examples=40, print_blob=True)
@given(data=st.data())
def test_random_calls(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 7)))
    most = (30, 40, 24) if interpreted(backend) else (70, 220, 140)  # the interpreter is slow
    rows, keys, dim = (draw(st.integers(1, n)) for n in most)
    dtype = draw(st.sampled_from(dtypes_of(backend)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    query, key = inputs(batch, key_heads * group, key_heads, rows, keys, dim, dtype)
    kinds = st.lists(st.sampled_from(("mean", "sum", "max", "last")), min_size=1, max_size=4) | st.just(["none"])
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "cosine": draw(st.booleans()),
        "scale": draw(st.sampled_from((None, 0.0, -0.5, 2.0))),
        "head_reduction": draw(st.sampled_from(HEADS)),
        "query_reduction": "+".join(draw(kinds)),
    }
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, keys) < draw(st.sampled_from((0.1, 0.8)))
    if draw(st.booleans()):
        options["query_mask"] = torch.rand(batch, rows) < draw(st.sampled_from((0.1, 0.8)))
    if draw(st.booleans()):
        options["query_positions"] = torch.randint(-2, keys + 2, (batch, rows))
    if draw(st.booleans()):
        options["key_indices"] = torch.randint(-1, keys, (batch, draw(st.integers(0, 50))))
    check(backend, query, key, **options)
