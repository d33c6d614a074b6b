"""Numbers that the host has reach a device without a wait: seen on meta tensors, which stand for those of a GPU."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import tokenprune_kernels as tp

FEATURES = torch.empty(3, 9, 4, device="meta")
SCORES = torch.empty(3, 9, device="meta")


class NoWaiting(TorchFunctionMode):
    """Raises where torch would copy from the host and wait for the stream, as such a copy does unless told not to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        copied = name in ("tensor", "as_tensor", "new_tensor")
        copied |= name == "to" and args[0].device.type == "cpu" and not kwargs.get("non_blocking")
        copied |= name == "__getitem__" and isinstance(args[1], list)
        assert not (copied and result.device.type == "meta"), f"{name} waits for the device"
        return result


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.tensor([1, 2]).to("meta"), lambda: torch.tensor([1, 2], device="meta"),
        lambda: FEATURES.new_tensor([1.0]), lambda: FEATURES[[0, 2]],
    ],
    ids=["to", "tensor", "new_tensor", "index"],
)  # fmt: skip
def test_the_mode_sees_a_wait(wait: Any) -> None:
    with NoWaiting():
        torch.tensor([1, 2]).to("meta", non_blocking=True)
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()


def test_budgets_of_samples_do_not_wait_for_the_device() -> None:
    with NoWaiting():
        assert tp.select_topk(SCORES, [1, 3, 1])[0].shape == (3, 3)
        assert tp.dpp_sample(FEATURES, [1, 3, 1], quality=SCORES)[0].shape == (3, 3)
        assert tp.methods.scope(FEATURES, SCORES, [1, 3, 1]).indices.shape == (3, 3)


def test_vidcom2_does_not_wait_for_the_device() -> None:
    with NoWaiting():
        frames = torch.zeros(3, 9, dtype=torch.int64, device="meta")
        assert tp.methods.vidcom2(FEATURES, frames, 4).indices.shape == (3, 4)
