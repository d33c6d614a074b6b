"""TOKENPRUNE_PLAN, which fixes choices of the launch planners, and what a call asks of the device: on the emulator."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import emulator
import tokenprune_kernels as tp
from testing import ROOT, op_samples
from testing.cases import NO_EMULATOR
from testing.gpu_checks import assert_same_bits, close
from testing.gpu_device import flat
from testing.op_samples import OPS, SAMPLES, Sizes
from tokenprune_kernels import _op as described

pytestmark = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
module = emulator.load() if NO_EMULATOR is None else None
PLANNED = tuple(module.PLANNED) if module is not None else ()
# Sizes with several blocks, tiles and ranges of every kernel.
SIZES = Sizes(batch=2, tokens=300, rows=70, channels=40, k=40, listed=30)
# What each part of a name concerns.
OPS_OF = {
    "attention": ("cross_attention_scores", "attention_scores", "attention_entropy"),
    "repulsion": ("repulsion_sample",),
    "nms": ("spatial_semantic_nms",),
    "similarity": ("cosine_scores", "contrastive_scores", "paired_cosine"),
    "select": ("select_topk", "select_grouped_topk", "select_two_tailed", "mask_to_indices"),
    "mixture": ("select_mixture",),
    "gather": ("gather_compact",),
    "dpp": ("dpp_sample",),
    "coverage": ("coverage_sample",),
}


@pytest.fixture(autouse=True)
def _no_overrides() -> Iterator[None]:
    yield
    module.set_plan("")


def run(op: str, name: str, sizes: Sizes | None = None) -> list[torch.Tensor]:
    args, kwargs = op_samples.positional(op_samples.make(op, name, sizes))
    return flat(getattr(tp, op)(*args, **kwargs, backend="emulator"))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in SAMPLES if "cuda" in described.OPS[op].backends])
def test_a_second_call_asks_the_device_for_nothing(op: str, name: str) -> None:
    """Properties of the device and of its kernels are asked for once: a query costs more than a small launch."""
    module.settings().shared_per_block = 227 * 1024 - 16 * (1 + SAMPLES.index((op, name)))  # a device of its own
    module.take_queries()
    run(op, name, SIZES)
    assert module.take_queries() >= 4
    run(op, name, SIZES)
    assert module.take_queries() == 0


def test_every_name_concerns_an_op() -> None:
    assert {name.split(".")[0] for name in PLANNED} == set(OPS_OF)
    assert set(itertools.chain(*OPS_OF.values())) <= set(OPS)


@pytest.mark.parametrize("planned", PLANNED)
@pytest.mark.parametrize("value", [-5, 1, 3, 8, 10**12])
def test_no_override_makes_a_result_wrong(planned: str, value: int) -> None:
    for op, name in SAMPLES:
        if op in OPS_OF[planned.split(".")[0]]:
            module.set_plan("")
            want = run(op, name, SIZES)
            module.set_plan(f"{planned}={value}")
            close(run(op, name, SIZES), want, 1e-6)


def launched(plan: str, op: str, tokens: int, **arguments: Any) -> list[dict[str, Any]]:
    call = op_samples.make(op, "plain", Sizes(batch=1, tokens=tokens, rows=100, channels=512, k=40, listed=30))
    args, kwargs = op_samples.positional(op_samples.Call(op, call.arguments | arguments))
    module.set_plan(plan)
    module.take_launches()
    getattr(tp, op)(*args, **kwargs, backend="emulator")
    return module.take_launches()


FEW = torch.arange(3 * 4500).remainder(17).float().view(1, 4500, 3)
# For every name a value that changes a launch, and the call: op, tokens, and other arguments than its sample's.
CHANGES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "attention.splits": ("1", "attention_entropy", 1000, {}),
    "attention.cluster": ("1", "cross_attention_scores", 300, {}),
    "attention.teams": ("1,attention.cluster=1", "cross_attention_scores", 300, {}),
    "attention.row_parts": ("2", "attention_scores", 300, {}),
    "repulsion.matrix": ("0", "repulsion_sample", 300, {}),
    "repulsion.tile": ("128", "repulsion_sample", 300, {}),
    "repulsion.parts": ("1", "repulsion_sample", 300, {}),
    "repulsion.threads": ("96", "repulsion_sample", 300, {}),
    "repulsion.cluster": ("2", "repulsion_sample", 4500, {"features": FEW}),
    "repulsion.blocks": ("2,repulsion.matrix=0", "repulsion_sample", 300, {}),
    "nms.table": ("0", "spatial_semantic_nms", 300, {}),
    "nms.capacity": ("0,nms.table=0", "spatial_semantic_nms", 300, {}),
    "nms.splits": ("1,nms.table=0", "spatial_semantic_nms", 300, {}),
    "nms.cluster": ("4,nms.table=0", "spatial_semantic_nms", 300, {}),
    "nms.threads": ("128", "spatial_semantic_nms", 300, {}),
    "similarity.cluster": ("1", "cosine_scores", 300, {}),
    "similarity.teams": ("1", "cosine_scores", 300, {}),
    "similarity.rows_per_warp": ("4", "contrastive_scores", 300, {"anchor_indices": torch.arange(3).unsqueeze(0)}),
    "similarity.pair_warps": ("2", "paired_cosine", 300, {}),
    "select.cluster": ("8", "select_topk", 300, {}),
    "select.threads": ("64", "select_topk", 300, {}),
    "select.digit": ("4", "select_grouped_topk", 300, {}),
    "mixture.threads": ("128", "select_mixture", 1000, {}),
    "gather.vectors": ("1024", "gather_compact", 300, {}),
    "dpp.matrix": ("0", "dpp_sample", 300, {}),
    "dpp.cluster": ("2", "dpp_sample", 300, {}),
    "coverage.cluster": ("2", "coverage_sample", 300, {}),
}


@pytest.mark.parametrize("planned", PLANNED)
def test_an_override_changes_the_launch(planned: str) -> None:
    value, op, tokens, arguments = CHANGES[planned]
    beside = value.partition(",")[2]
    assert launched(f"{planned}={value}", op, tokens, **arguments) != launched(beside, op, tokens, **arguments)


def test_the_page_explains_every_name() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert [name for name in PLANNED if f"`{name}`" not in page] == []


def test_overrides_change_nothing_about_determinism() -> None:
    module.set_plan("select.cluster=4,select.threads=64")
    assert_same_bits(run("select_topk", "plain", SIZES), run("select_topk", "plain", SIZES), "repeat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nms.colour=3", "expected one of attention.splits, .*gather.vectors, .*, got 'nms.colour'"),
        ("select.threads", "select.threads must be an integer, got ''"),
        ("select.threads=many", "select.threads must be an integer, got 'many'"),
        ("select.threads=64,,", "expected one of .*, got ''"),
    ],
)
def test_what_cannot_be_read_is_an_error(text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match="TOKENPRUNE_PLAN: " + message):
        module.set_plan(text)


def test_the_variable_is_read_by_the_first_call() -> None:
    program = (
        "import torch, emulator, tokenprune_kernels as tp\n"
        "from tokenprune_kernels import _backend\n"
        "_backend._extra['emulator'] = emulator.ops(), 'cuda'\n"
        "tp.select_topk(torch.rand(1, 100), 5, backend='emulator')\n"
        "print([l['block'] for l in emulator.load().take_launches()])\n"
    )

    def run_with(plan: str) -> subprocess.CompletedProcess[str]:
        import os

        return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "TOKENPRUNE_PLAN": plan},
                              capture_output=True, text=True, check=False)  # fmt: skip

    assert run_with("select.threads=256").stdout == "[(256, 1, 1)]\n"
    assert "TOKENPRUNE_PLAN: expected one of attention.splits" in run_with("select.thread=256").stderr
