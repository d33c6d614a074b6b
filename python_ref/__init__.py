"""The specification: every op of tokenprune_kernels in short, literal PyTorch.

These functions run on any device and in float64. They favour being obviously right over being fast, and every compiled
backend is tested against them. They do not validate their arguments; `tokenprune_kernels.<op>` does.
"""

from .attention import attention_entropy, attention_scores, cross_attention_scores
from .compaction import _invert_indices as _invert_indices
from .compaction import gather_compact
from .coverage import coverage_sample
from .density import density_peaks
from .dpp import dpp_sample
from .merging import merge_tokens
from .mixture import select_mixture
from .nms import spatial_semantic_nms
from .repulsion import repulsion_sample
from .selection import mask_to_indices, score_entropy, select_grouped_topk, select_topk, select_two_tailed
from .similarity import contrastive_scores, cosine_scores, paired_cosine

__all__ = [
    "attention_entropy",
    "attention_scores",
    "contrastive_scores",
    "cosine_scores",
    "coverage_sample",
    "cross_attention_scores",
    "density_peaks",
    "dpp_sample",
    "gather_compact",
    "mask_to_indices",
    "merge_tokens",
    "paired_cosine",
    "repulsion_sample",
    "score_entropy",
    "select_grouped_topk",
    "select_mixture",
    "select_topk",
    "select_two_tailed",
    "spatial_semantic_nms",
]
