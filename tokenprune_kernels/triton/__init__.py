"""The Triton kernels: the same ops for GPUs without a compiled library, and a second implementation to check it by.

Importing this package imports Triton; the rest of tokenprune_kernels does so only when a call needs it.
"""

from .attention import attention_entropy, attention_scores, cross_attention_scores
from .selection import score_entropy

__all__ = ["attention_entropy", "attention_scores", "cross_attention_scores", "score_entropy"]
