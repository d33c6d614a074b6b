"""query_reduction="none" in the CUDA column pass, emulated: in every way of splitting heads and rows, in one launch."""

from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from testing.cases import NO_EMULATOR, dtypes_of
from tests.cuda.test_attention import HEADS, REGIMES, check, device, inputs, module, over_dtypes, over_regimes, set_up

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))


@over_regimes
def test_every_regime_takes_one_launch_and_agrees_with_the_reference(regime: str) -> None:
    (query, key, lse), options = set_up(regime)
    options["query_reduction"] = "none"
    cluster, teams = REGIMES[regime][3][1:3]
    _, (launch,) = check(query, key, lse, **options)
    assert (launch["cluster"], launch["block"]) == (cluster, (128 * teams, 1, 1))
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    query_mask = torch.rand(batch, rows) < 0.7
    query_mask[0, rows // 2 :] = False
    check(query, key, lse, key_indices=torch.randint(-1, keys, (batch, keys)), key_mask=torch.rand(batch, keys) < 0.7,
          query_mask=query_mask, causal=True, query_positions=torch.randint(-2, keys + 2, (batch, rows)), cosine=True,
          **options)  # fmt: skip


@over_dtypes
@pytest.mark.parametrize("heads", HEADS)
def test_every_storage_type(dtype: torch.dtype, heads: str) -> None:
    query, key, lse = inputs(1, 4, 2, 70, 70, 24, dtype)
    query_mask = torch.rand(1, 70) < 0.7
    _, (launch,) = check(query, key, lse, head_reduction=heads, query_reduction="none", query_mask=query_mask)
    storage = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[dtype]
    assert launch["kernel"].startswith(f"attention_columns_kernel<{storage},")


def test_long_lists_of_rows_are_split_without_a_second_launch() -> None:
    device(sm_count=8)
    query, key, lse = inputs(1, 1, 1, 1090, 5, 8)
    _, (launch,) = check(query, key, lse, query_reduction="none", causal=True)
    assert launch["grid"][0] > 1


@over_regimes
def test_the_order_of_threads_and_blocks_changes_nothing(regime: str) -> None:
    (query, key, lse), options = set_up(regime)
    options |= {"query_reduction": "none", "causal": True}
    results = []
    for schedule, seed in (("reversed", 0), ("shuffled", 1)):
        device(schedule=getattr(module.Schedule, schedule), seed=seed)
        results.append(tp.attention_scores(query, key, lse, backend="emulator", **options))
    assert torch.equal(*results)


def test_rows_of_several_tiles_are_what_last_gives_of_them() -> None:
    for dtype in dtypes_of("emulator"):
        query, key, lse = inputs(1, 6, 2, 130, 20, 8, dtype)
        for heads in HEADS:
            options: dict[str, Any] = {"head_reduction": heads, "backend": "emulator"}
            rows = tp.attention_scores(query, key, lse, query_reduction="none", **options)
            for row in (0, 70, 129):
                mask = torch.arange(130).unsqueeze(0) == row
                last = tp.attention_scores(query, key, lse, query_reduction="last", query_mask=mask, **options)
                assert torch.equal(last, rows[..., row, :])


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_nothing_to_score_is_no_launch(which: str) -> None:
    query, key, lse = inputs(2, 2, 2, 0 if which == "rows" else 3, 5, 8)
    listed = torch.zeros(2, 0 if which == "columns" else 4, dtype=torch.int64)
    module.take_launches()
    tp.attention_scores(query, key, lse, key_indices=listed, query_reduction="none", backend="emulator")
    assert module.take_launches() == []
