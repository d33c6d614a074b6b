"""The Qwen models that several files of tests run, with their prompts: ragged images, and a video."""

import functools
from typing import Any

from . import models_qwen as qwen
from .models import Prompts

KEEP = 0.4
# 32 + 12 visual tokens and 14 text tokens against 16 and 9: padding on the left, sizes and numbers of images differ.
RAGGED = [[3, (1, 8, 12), 2, (1, 4, 8), 2, ("video", (3, 4, 4)), 5], [2, (1, 8, 8), 4]]


@functools.cache
def model(name: str) -> Any:
    return qwen.model(name)


@functools.cache
def batch(name: str) -> Prompts:
    return qwen.prompts(model(name), RAGGED)
