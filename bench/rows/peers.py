"""Other packages that do what a row does, called as their releases of 2026 document it. Each is imported when it is
asked for: what is not installed is reported, and none is needed."""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testing.gpu_checks import Function, Inputs
from testing.gpu_device import UnavailableError


class Peer(NamedTuple):
    name: str
    rows: str  # a pattern of row names
    module: str
    call: Callable[[Any, Inputs], Tensor]  # of the module and the row's inputs

    def load(self) -> Function:
        try:
            module = importlib.import_module(self.module)
        except Exception as error:
            raise UnavailableError(f"not run: {self.module} cannot be imported ({error})") from None

        def run(x: Inputs) -> Tensor:
            try:
                return self.call(module, x)
            except (TypeError, AttributeError) as error:
                raise UnavailableError(f"not run: {self.module} is called otherwise than we know ({error})") from None

        return run


def box_nms(module: Any, x: Inputs) -> Tensor:
    """Boxes of five by five cells around the tokens: another, simpler thing on as many candidates."""
    centre = x["positions"][0]
    return module.nms(torch.cat([centre - 2.5, centre + 2.5], dim=1), x["scores"][0].float(), 0.5)


def picks(x: Inputs) -> int:
    return x["points"].shape[1] // 4


def torch_fps(module: Any, x: Inputs) -> Tensor:
    valid = torch.ones(x["points"].shape[:2], dtype=torch.bool, device=x["points"].device)
    return module.farthest_point_sampling(x["points"], valid, picks(x), random_start=False, validate=False)


def quickfps(module: Any, x: Inputs) -> Tensor:
    return module.sample_idx(x["points"], picks(x), start_idx=0)


def colreduce(module: Any, x: Inputs) -> Tensor:
    group = x["query"].shape[1] // x["key"].shape[1]
    return module.flash_colreduce(x["query"], x["key"].repeat_interleave(group, dim=1), reduction="mean").mean(1)


def flex_twice(module: Any, x: Inputs) -> Tensor:
    """FlexAttention gives the lse of the rows; of the transposed product, from which it subtracts that, the lse over
    the rows is the logarithm of the column sums."""
    query = x["query"]
    key = x["key"].repeat_interleave(query.shape[1] // x["key"].shape[1], dim=1)
    flex = compiled_flex(module) if query.is_cuda else module.flex_attention
    lse = flex(query, key, key, return_lse=True)[1]

    def minus_lse(score: Tensor, b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return score - lse[b, h, row]

    columns = flex(key, query, query, score_mod=minus_lse, return_lse=True)[1]
    return columns.exp().mean(1) / query.shape[2]


_compiled: dict[str, Any] = {}


def compiled_flex(module: Any) -> Any:
    if "flex" not in _compiled:
        _compiled["flex"] = torch.compile(module.flex_attention, dynamic=False)
    return _compiled["flex"]


SCORES = r"^scores (LLaVA|Qwen|long|square)"
PEERS = (
    Peer("torchvision nms", r"^NMS ", "torchvision.ops", box_nms),
    Peer("torch-fps", r"^farthest points", "torch_fps", torch_fps),
    Peer("torch-quickfps", r"^farthest points", "torch_quickfps", quickfps),
    Peer("Flash-ColReduce", SCORES, "flash_colreduce", colreduce),
    Peer("FlexAttention twice", SCORES, "torch.nn.attention.flex_attention", flex_twice),
)


def peers_of(row: str) -> list[Peer]:
    return [peer for peer in PEERS if re.search(peer.rows, row)]
