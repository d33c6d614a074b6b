"""Attention scores of heads that lie on several ranks: torchrun --nproc-per-node 2 examples/dtensor.py"""

import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tokenprune_kernels as tp
import tokenprune_kernels.distributed  # the ops take DTensors from here on

mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
torch.manual_seed(0)
query, key = torch.randn(2, 8, 16, 64), torch.randn(2, 4, 576, 64)
scores, _, _ = tp.cross_attention_scores(*(distribute_tensor(t, mesh, [Shard(1)]) for t in (query, key)))
indices, _ = tp.select_topk(scores, 128)  # every rank needs all scores: they are added up here
alone, _ = tp.select_topk(tp.cross_attention_scores(query, key)[0], 128)
print(f"scores {scores.placements}, the tokens of one process: {torch.equal(indices.full_tensor(), alone)}")
