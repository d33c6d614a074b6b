"""The Triton kernels: the same ops for GPUs without a compiled library, and a second implementation to check it by.

Importing this package imports Triton; the rest of tokenprune_kernels does so only when a call needs it.
"""

from .entropy_of_scores import score_entropy
from .mixture import select_mixture
from .topk import mask_to_indices, select_topk, select_two_tailed

__all__ = ["mask_to_indices", "score_entropy", "select_mixture", "select_topk", "select_two_tailed"]
