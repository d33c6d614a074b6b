"""The Triton kernels: the same ops for GPUs without a compiled library, and a second implementation to check it by.

Importing this package imports Triton; the rest of tokenprune_kernels does so only when a call needs it.
"""

from .attention import attention_entropy, attention_scores, cross_attention_scores
from .compaction import _invert_indices, gather_compact
from .coverage import coverage_sample
from .density import density_peaks
from .dpp import dpp_sample
from .merging import merge_tokens
from .mixture import select_mixture
from .nms import spatial_semantic_nms
from .repulsion import repulsion_sample
from .selection_entropy import score_entropy
from .selection_groups import select_grouped_topk
from .selection_topk import mask_to_indices, select_topk, select_two_tailed
from .similarity import contrastive_scores, cosine_scores, paired_cosine

__all__ = [
    "_invert_indices",
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
