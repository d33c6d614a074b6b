"""What a call costs before any work is done: every op on one element, against the aten op nearest to it.

torch.ops.tokenprune.X may cost 1.5 times the aten op, the Python function with its argument checks 4 times; importing
the package may cost 50 ms on top of torch. The Triton wrappers are Python: their part of a call is shown, without a
bound. Each function makes CALLS calls.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenprune_kernels as tp
from tokenprune_kernels import _triton

CALLS = 200
IMPORTS = 5
aten = torch.ops.aten

score = torch.rand(1, 1)
weight = torch.ones(1)
mask = torch.ones(1, 1, dtype=torch.bool)
index = torch.zeros(1, 1, dtype=torch.int64)
feature = torch.rand(1, 1, 1)
query = torch.rand(1, 1, 1, 1)
lse = torch.zeros(1, 1, 1)
low = torch.zeros(1, dtype=torch.int64)
position = torch.zeros(1, 1, 2)


def one_output() -> Any:
    return aten.amax(score, [1])


def two_outputs() -> Any:
    return aten.topk(score, 1)


def three_outputs() -> Any:
    return aten.native_layer_norm(score, [1], weight, weight, 1e-5)


def attention() -> Any:
    return aten.scaled_dot_product_attention(query, query, query)


def cosine() -> Any:
    return aten.cosine_similarity(feature, feature, -1)


def list_of_outputs() -> Any:
    return aten._foreach_abs([feature])


def index_select() -> Any:
    return aten.index_select(feature, 1, low)


OPS: dict[str, tuple[Callable[[], Any], tuple[Any, ...], dict[str, Any]]] = {
    "cross_attention_scores": (three_outputs, (query, query), {}),
    "attention_entropy": (two_outputs, (query, query), {}),
    "attention_scores": (attention, (query, query, lse), {}),
    "score_entropy": (one_output, (score,), {}),
    "cosine_scores": (cosine, (feature, feature), {}),
    "contrastive_scores": (cosine, (feature, index, index), {}),
    "select_topk": (two_outputs, (score, 1), {}),
    "select_two_tailed": (two_outputs, (score, low, 1), {}),
    "select_mixture": (three_outputs, (score, score, 1), {}),
    "mask_to_indices": (two_outputs, (mask, 1), {}),
    "repulsion_sample": (two_outputs, (feature, 1), {}),
    "spatial_semantic_nms": (three_outputs, (score, feature, position, 1), {}),
    "gather_compact": (list_of_outputs, ([feature], index), {"dims": [1]}),
}


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(CALLS - 1):
            call()
        return call()

    return run


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("level", ["op", "function"])
def test_overhead(race: Any, name: str, level: str) -> None:
    baseline, args, kwargs = OPS[name]
    function = getattr(torch.ops.tokenprune if level == "op" else tp, name)

    def check(results: dict[str, Any]) -> None:
        want = flat(getattr(tp.reference, name)(*args, **kwargs))
        for got, w in zip(flat(results["ours"]), want, strict=True):
            torch.testing.assert_close(got.reshape(w.shape), w)

    # The modes in which models are run for inference; autograd itself is not what is measured here.
    with torch.inference_mode():
        race(
            f"{CALLS} calls: {'torch.ops.tokenprune.' if level == 'op' else 'tokenprune_kernels.'}{name}",
            {"ours": repeated(lambda: function(*args, **kwargs)), baseline.__name__: repeated(baseline)},
            check=check,
            target=(baseline.__name__, 1 / 1.5 if level == "op" else 1 / 4),
            seconds=0.5,
        )


@pytest.mark.parametrize("name", OPS)
def test_overhead_of_triton(race: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host does in a call of the Triton kernels, from the dispatcher to the launches, which are left out."""
    pytest.importorskip("triton")
    from tokenprune_kernels.triton import runtime

    monkeypatch.setattr(runtime, "recorder", lambda *launch: None)
    baseline, args, kwargs = OPS[name]
    function = getattr(_triton.namespace(), name)

    def check(results: dict[str, Any]) -> None:
        want = flat(getattr(torch.ops.tokenprune, name)(*args, **kwargs))
        assert [(t.shape, t.dtype) for t in flat(results["ours"])] == [(t.shape, t.dtype) for t in want]

    with torch.inference_mode():
        race(
            f"{CALLS} calls: torch.ops.tokenprune_triton.{name}, without launches",
            {"ours": repeated(lambda: function(*args, **kwargs)), baseline.__name__: repeated(baseline)},
            check=check,
            seconds=0.5,
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_overhead_of_the_differentiable_op(race: Any, mode: Callable[[], Any]) -> None:
    """Outside inference_mode gather_compact passes through its Python kernel for autograd."""
    function = torch.ops.tokenprune.gather_compact
    _, args, kwargs = OPS["gather_compact"]
    with mode():
        race(
            f"{CALLS} calls: torch.ops.tokenprune.gather_compact, {mode.__name__}",
            {
                "ours": repeated(lambda: function(*args, **kwargs)),
                "list_of_outputs": repeated(list_of_outputs),
                "index_select": repeated(index_select),
            },
            check=lambda results: torch.testing.assert_close(results["ours"][0], feature),
            seconds=0.5,
        )


def test_import_time(benchmark: Any) -> None:
    """Processor time of `import tokenprune_kernels` after `import torch`, the best of a few fresh processes."""
    code = "import time, torch; t = time.process_time(); import tokenprune_kernels; print(time.process_time() - t)"
    command = [sys.executable, "-c", code]
    times = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(IMPORTS)]
    best, limit = min(times), 0.05
    benchmark.extra_info.update(
        case="import", seconds={"ours": best, "limit": limit}, target=("limit", 1.0),
        ratios={"ours": 1.0, "limit": limit / best},
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
