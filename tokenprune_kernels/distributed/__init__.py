"""Ops on sharded tensors: `import tokenprune_kernels.distributed`, and every op takes DTensors (docs/distributed.md).

Which dimensions may be split over the ranks is part of each op's description. An input that is split otherwise is
gathered first, as torch's own operators do.
"""

import torch

if not torch.distributed.is_available():
    raise ImportError("tokenprune_kernels.distributed needs torch.distributed, which this build of torch lacks")

from . import _dispatch
from ._merge import merge_entropy, merge_lse

__all__ = ["merge_entropy", "merge_lse"]

_dispatch.register()
