"""The public functions, one per op and file: each checks its arguments, chooses the backend and makes one call."""

from .attention_entropy import attention_entropy
from .attention_scores import attention_scores
from .contrastive_scores import contrastive_scores
from .cosine_scores import cosine_scores
from .coverage_sample import coverage_sample
from .cross_attention_scores import cross_attention_scores
from .density_peaks import density_peaks
from .dpp_sample import dpp_sample
from .gather_compact import gather_compact
from .mask_to_indices import mask_to_indices
from .merge_tokens import merge_tokens
from .paired_cosine import paired_cosine
from .repulsion_sample import repulsion_sample
from .score_entropy import score_entropy
from .select_grouped_topk import select_grouped_topk
from .select_mixture import select_mixture
from .select_topk import select_topk
from .select_two_tailed import select_two_tailed
from .spatial_semantic_nms import spatial_semantic_nms

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
