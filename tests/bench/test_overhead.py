"""What a call enters before its kernel: counted, because a frame costs the same everywhere and times do not."""

import pytest

from bench import bench_overhead
from tokenprune_kernels._op import public_ops


def test_what_is_measured_are_ops() -> None:
    assert len(bench_overhead.OPS) >= 13
    assert set(bench_overhead.OPS) <= set(public_ops())


@pytest.mark.parametrize("name", bench_overhead.OPS)
def test_a_call_enters_few_python_functions(name: str) -> None:
    """The public function, its checks, the choice of the backend and torch's own call; gather_compact has lists to
    check and, for its gradient, a Python kernel."""
    _, args, kwargs = bench_overhead.OPS[name]
    function = getattr(bench_overhead.tp, name)
    with bench_overhead.torch.inference_mode():
        frames = bench_overhead.python_frames(lambda: function(*args, **kwargs))
    assert 0 < frames <= (13 if name == "gather_compact" else 9)
