"""Published token-pruning methods and baselines as functions from tensors to a `Selection`, and their descriptions.

The functions take `k` as `select_topk` does: a number of tokens, a share of all (a float in (0, 1]), or one of these
for each sample. Those that read attention take `layout` as `cross_attention_scores` does.
"""

from ._common import Selection
from ._method import ARGUMENTS, Method, Stage
from ._registry import add, get_method, method_names, register_method, unregister_method
from .adafv import ADAFV, adafv
from .adaptprune import ADAPTPRUNE, adaptprune
from .baselines import DIVPRUNE, FASTV, RANDOM, divprune, fastv, random
from .cdpruner import CDPRUNER, cdpruner
from .coast import COAST, coast
from .dart import DART, dart
from .evs import EVS, evs
from .idpruner import IDPRUNER, idpruner
from .mmtok import MMTOK, mmtok
from .pyramiddrop import PYRAMIDDROP, pyramiddrop
from .scope import SCOPE, scope
from .sparsevlm import SPARSEVLM, sparsevlm
from .sts import STS, sts_semantics, sts_structure
from .vidcom2 import VIDCOM2, vidcom2
from .visionzip import VISIONZIP, visionzip
from .vispruner import VISPRUNER, vispruner
from .zspaprune import ZSPAPRUNE, zspaprune

__all__ = [
    "ARGUMENTS",
    "Method",
    "Selection",
    "Stage",
    "adafv",
    "adaptprune",
    "cdpruner",
    "coast",
    "dart",
    "divprune",
    "evs",
    "fastv",
    "get_method",
    "idpruner",
    "method_names",
    "mmtok",
    "pyramiddrop",
    "random",
    "register_method",
    "scope",
    "sparsevlm",
    "sts_semantics",
    "sts_structure",
    "unregister_method",
    "vidcom2",
    "visionzip",
    "vispruner",
    "zspaprune",
]

# The order of every table.
_PUBLISHED = (
    COAST, STS, ADAFV, ZSPAPRUNE, ADAPTPRUNE, DART, EVS, VIDCOM2, CDPRUNER, SCOPE, MMTOK, PYRAMIDDROP, VISIONZIP,
    SPARSEVLM, VISPRUNER, IDPRUNER,
)  # fmt: skip
for _method in (*_PUBLISHED, FASTV, DIVPRUNE, RANDOM):
    add(_method)
del _method, _PUBLISHED, add
