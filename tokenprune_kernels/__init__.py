"""Visual-token pruning kernels: the ops `torch.ops.tokenprune.*`, their Python functions, references and methods."""

from . import _registry

_registry.load()

from . import methods, reference  # noqa: E402
from ._backend import BackendUnavailableError, use_backend  # noqa: E402
from ._config import config, show_config  # noqa: E402
from ._version import __version__  # noqa: E402
from .ops import (  # noqa: E402
    attention_entropy,
    attention_scores,
    contrastive_scores,
    cosine_scores,
    cross_attention_scores,
    gather_compact,
    mask_to_indices,
    repulsion_sample,
    score_entropy,
    select_mixture,
    select_topk,
    select_two_tailed,
    spatial_semantic_nms,
)

__all__ = [
    "BackendUnavailableError",
    "__version__",
    "attention_entropy",
    "attention_scores",
    "config",
    "contrastive_scores",
    "cosine_scores",
    "cross_attention_scores",
    "gather_compact",
    "mask_to_indices",
    "methods",
    "reference",
    "repulsion_sample",
    "score_entropy",
    "select_mixture",
    "select_topk",
    "select_two_tailed",
    "show_config",
    "spatial_semantic_nms",
    "use_backend",
]
