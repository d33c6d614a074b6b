"""What TOKENPRUNE_VLLM says, read without torch and without vLLM."""

import ast
import functools
import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

VARIABLE = "TOKENPRUNE_VLLM"
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Setting:
    """method, keep: of which images, how many visual tokens of each, or which share of them; None: images are left.
    seed: of methods that draw. options: further keywords of the method's function. video: whether the engine's own
    pruning of videos is served by this package's ops."""

    method: str | None = None
    keep: int | float | None = None
    seed: int = 0
    video: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Which tokens of an image are kept depends on this and on nothing else that the engine does not know."""
        named = [self.method, self.keep, self.seed, sorted(self.options.items())]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def parse(text: str) -> Setting:
    """The setting that a text of entries `name=value`, separated by commas, stands for.

    Raises:
        ValueError: an entry is no `name=value`, or a value is out of its range.

    >>> from tokenprune_kernels.integrations.vllm import parse
    >>> parse("method=visionzip, keep=128, contextual_ratio=0")
    Setting(method='visionzip', keep=128, seed=0, video=False, options={'contextual_ratio': 0})
    """
    given: dict[str, Any] = {}
    for entry in text.split(","):
        name, _, value = (part.strip() for part in entry.partition("="))
        if not name.isidentifier() or not value:
            raise ValueError(f"{VARIABLE}: an entry must be name=value, got {entry.strip()!r} in {text!r}")
        if name in given:
            raise ValueError(f"{VARIABLE}: {name} must be given once, got {text!r}")
        given[name] = _value(value)
    video = given.pop("video", "off")
    if video not in _SWITCH:
        raise ValueError(f"{VARIABLE}: video must be on or off, got {video!r}")
    method, keep, seed = given.pop("method", None), given.pop("keep", None), given.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"{VARIABLE}: seed must be an int, got {seed!r}")
    if method is None:
        if keep is not None or given or not _SWITCH[video]:
            raise ValueError(f"{VARIABLE}: method is missing in {text!r}")
        return Setting(video=True)
    _check_keep(keep)
    return Setting(str(method), keep, seed, _SWITCH[video], given)


def _value(text: str) -> Any:
    """A literal of Python, or else a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_keep(keep: Any) -> None:
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not count and not (isinstance(keep, float) and 0 < keep <= 1):
        raise ValueError(
            f"{VARIABLE}: keep must be a number of tokens from 1 on, or a share in (0, 1] with a decimal point, got "
            f"{keep!r}"
        )


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Setting:
    return parse(text)


def current() -> Setting:
    """The setting of this process."""
    return _parsed(os.environ.get(VARIABLE, ""))
