"""Sweeps what the launch planners choose (TOKENPRUNE_PLAN) and keeps the best of every row.

One choice after the other, each with the best of those before it. Every plan's result is checked before it is timed, so
that no plan wins by being wrong. The table plans.csv is what a planner's rule has to be changed to, or the proof that
it need not be.
"""

from functools import partial

import torch

from bench.gpu_timer import device_microseconds, input_sets, measure
from bench.rows import Row
from testing.gpu_device import Device
from testing.gpu_samples import require

from .timing import checked
from .work import Item, Items

POWERS = (1, 2, 4, 8)
THREADS = (64, 128, 256, 512, 1024)
# The values of each name of csrc/include/tokenprune/overrides.h, and the ops whose plans they change.
ROWS = ("cross_attention_scores", "attention_entropy")
SCORES = ("cross_attention_scores", "attention_scores")
REPULSION, NMS = ("repulsion_sample",), ("spatial_semantic_nms",)
SIMILARITY = ("cosine_scores", "contrastive_scores")
SELECT = ("select_topk", "select_grouped_topk", "select_two_tailed", "mask_to_indices")
SWEEPS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "attention.splits": (ROWS, (1, 2, 4, 8, 16, 32, 64)),
    "attention.cluster": (SCORES, POWERS),
    "attention.teams": (SCORES, (1, 2, 3)),
    "attention.row_parts": (("attention_scores",), (1, 2, 4, 8, 16)),
    "repulsion.matrix": (REPULSION, (0, 4096)),
    "repulsion.tile": (REPULSION, (64, 128)),
    "repulsion.parts": (REPULSION, POWERS),
    "repulsion.threads": (REPULSION, THREADS),
    "repulsion.cluster": (REPULSION, POWERS),
    "repulsion.blocks": (REPULSION, (8, 16, 32, 64, 128)),
    "nms.table": (NMS, (0, 1)),
    "nms.capacity": (NMS, (0, 32, 64, 128, 256, 512)),
    "nms.splits": (NMS, (1, 2, 4, 8, 16)),
    "nms.cluster": (NMS, POWERS),
    "nms.threads": (NMS, (128, 256, 384)),
    "similarity.cluster": (SIMILARITY, POWERS),
    "similarity.teams": (SIMILARITY, (1, 2)),
    "similarity.rows_per_warp": (SIMILARITY, (1, 4)),
    "similarity.pair_warps": (("paired_cosine",), POWERS),
    "select.cluster": (SELECT, POWERS),
    "select.threads": (SELECT, (64, 128, 256, 512)),
    "select.digit": (("select_grouped_topk",), (3, 4, 5, 6, 7, 8)),
    "mixture.threads": (("select_mixture",), (128, 256, 512)),
    "gather.vectors": (("gather_compact",), (256, 512, 1024)),
    "dpp.matrix": (("dpp_sample",), (0, 4096)),
    "dpp.cluster": (("dpp_sample",), POWERS),
    "coverage.cluster": (("coverage_sample",), POWERS),
}
MARGIN = 0.98  # of the best time so far: a smaller gain is noise


@torch.inference_mode()
def tune(device: Device, row: Row, seconds: float) -> Item:
    found, ours = require(device, *row.ops), device.serve(row.ours, *row.ops)
    tried: dict[str, float] = {}
    inputs = row.make(device.torch_device, 0)
    sets = input_sets(device, row, inputs)

    def microseconds(plan: str) -> float:
        device.set_plan(plan)
        checked(row, inputs, ours(inputs))
        tried[plan] = device_microseconds(measure(device, ours, sets, seconds))
        return tried[plan]

    try:
        own = least = microseconds("")
        best = ""
        for name, (ops, values) in SWEEPS.items():
            base = best
            for value in values if set(ops) & set(row.ops) else ():
                plan = ",".join(filter(None, [base, f"{name}={value}"]))
                if (taken := microseconds(plan)) < MARGIN * least:
                    best, least = plan, taken
    finally:
        device.set_plan("")
    return {**found, "own_us": own, "best_us": least, "best": best, "tried": tried}


def items(device: Device, rows: list[Row]) -> Items:
    swept = {op for ops, _ in SWEEPS.values() for op in ops}
    tuned = [row for row in rows if len(row.ops) == 1 and row.ops[0] in swept]
    return {row.name: partial(tune, device, row, 0.02 if device.real else 0.0) for row in tuned}


def table(items: list[Item]) -> str:
    """plans.csv: what is best for every row. An empty plan is the planner's own."""
    lines = ["row,plan,us,planner's own us"]
    lines += [f'"{i["name"]}","{i["best"]}",{i["best_us"]:.2f},{i["own_us"]:.2f}' for i in items if "best" in i]
    return "\n".join(lines) + "\n"
