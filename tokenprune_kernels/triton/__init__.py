"""The Triton kernels: the same ops for GPUs without a compiled library, and a second implementation to check it by.

Importing this package imports Triton; the rest of tokenprune_kernels does so only when a call needs it.
"""

from .compaction import _invert_indices, gather_compact
from .selection import score_entropy
from .similarity import contrastive_scores, cosine_scores

__all__ = ["_invert_indices", "contrastive_scores", "cosine_scores", "gather_compact", "score_entropy"]
