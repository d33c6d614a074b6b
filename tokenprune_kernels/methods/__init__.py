"""Five published token-pruning methods and three baselines as functions from tensors to a `Selection`."""

from ._common import Selection
from .adafv import adafv
from .adaptprune import adaptprune
from .baselines import divprune, fastv, random
from .coast import coast
from .sts import sts_semantics, sts_structure
from .zspaprune import zspaprune

__all__ = [
    "Selection",
    "adafv",
    "adaptprune",
    "coast",
    "divprune",
    "fastv",
    "random",
    "sts_semantics",
    "sts_structure",
    "zspaprune",
]
