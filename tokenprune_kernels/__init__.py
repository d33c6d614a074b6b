"""Visual-token pruning kernels: the ops `torch.ops.tokenprune.*`, their Python functions, references and methods."""

from . import _registry, ops
from .ops import *  # noqa: F403

_registry.load()  # the ops are described, so that they can be registered

from . import methods, reference, varlen  # noqa: E402
from ._backend import BackendUnavailableError, use_backend  # noqa: E402
from ._config import config, show_config  # noqa: E402
from ._masks import indices_to_mask  # noqa: E402
from ._version import __version__  # noqa: E402
from ._weights import reduce_attention  # noqa: E402

__all__ = [
    "BackendUnavailableError",
    "__version__",
    "config",
    "indices_to_mask",
    "methods",
    "reduce_attention",
    "reference",
    "show_config",
    "use_backend",
    "varlen",
]
__all__ += ops.__all__
