"""The Triton kernels: the same ops for GPUs without a compiled library, and a second implementation to check it by.

Importing this package imports Triton; the rest of tokenprune_kernels does so only when a call needs it.
"""

from .nms import spatial_semantic_nms
from .repulsion import repulsion_sample
from .selection import score_entropy

__all__ = ["repulsion_sample", "score_entropy", "spatial_semantic_nms"]
