"""The methods by name: those of this package, in a fixed order, and then those that users register."""

import difflib
from collections.abc import Collection, Mapping, Sequence

from ._method import Choose, Method, Stage, name_of

_METHODS: dict[str, Method] = {}


def add(method: Method, *, replace: bool = False) -> Method:
    """Registers a description."""
    if method.name in _METHODS and not replace:
        raise ValueError(
            f"register_method: there is a method {method.name!r} already; replace=True puts this one there"
        )
    _METHODS[method.name] = method
    return method


def register_method(
    name: str,
    function: Choose | Sequence[Stage],
    *,
    needs: Mapping[str, str | None] | Collection[str] = (),
    stage: str | None = None,
    title: str = "",
    summary: str = "",
    paper: str = "",
    layer: int = 2,
    layers: Mapping[str, int] | None = None,
    positions: str = "original",
    replace: bool = False,
) -> Method:
    """Makes a function a method: `prune_visual_tokens(model, method=name)` then chooses visual tokens by it.

    Args:
        name: a name that no method has yet.
        function: takes `k`, the number of tokens to keep, and by the names of its parameters what it asks for: all
            that `tokenprune_kernels.methods.ARGUMENTS` lists. Only that is computed. Other parameters are options of
            `prune_visual_tokens`. It returns int64 indices [B, k] of distinct visual tokens of each sample (0 to V - 1)
            in any order, or a `Selection`, whose indices are ascending. A list of `Stage` chooses several times.
        needs: what it is given besides, for a function whose signature does not show it (`**kwargs`, a Module), or
            {parameter: argument} where a parameter has another name.
        stage: "model", in front of the language model, or "layer", in front of a decoder layer. Default: "layer" for
            what asks for the attention of the layer before; for others, when `layer=` is given.
        title, summary, paper: for tables: a longer name, by what it chooses, the arXiv id.
        layer, layers: the decoder layer by default, and {family: layer} where it is another one.
        positions: whether what is kept has its "original" positions or is to "renumber".
        replace: takes the place of a method of the same name.

    Returns:
        the description, which `prune_visual_tokens` takes in place of the name too.

    Raises:
        ValueError: the name is taken, or something is asked for that is not in `ARGUMENTS`.
        TypeError: the function does not take k.

    >>> from tokenprune_kernels.methods import register_method, unregister_method
    >>> def largest_norm(features, mask, k):
    ...     norm = features.norm(dim=-1)
    ...     return (norm if mask is None else norm.masked_fill(~mask, -1)).topk(k).indices
    >>> sorted(register_method("largest_norm", largest_norm).uses)
    ['features', 'mask']
    >>> unregister_method("largest_norm")
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_method: name must be a str that is not empty, got {name!r}")
    if not callable(function) and (needs or stage is not None):
        raise TypeError("register_method: with a list of Stage, each of them says what it needs and where it is")
    stages = (Stage(function, stage, needs),) if callable(function) else tuple(function)
    return add(
        Method(
            name, stages, title=title or name, summary=summary, paper=paper, layer=layer, layers=layers or {},
            positions=positions,
        ),
        replace=replace,
    )  # fmt: skip


def unregister_method(name: str) -> None:
    """Forgets a method.

    Raises:
        ValueError: there is none of this name.

    >>> from tokenprune_kernels.methods import method_names, register_method, unregister_method
    >>> first = register_method("first", lambda present, k: present.nonzero()[:, 1].view(len(present), -1)[:, :k])
    >>> unregister_method("first")
    >>> "first" in method_names()
    False
    """
    del _METHODS[get_method(name, caller="unregister_method").name]


def method_names() -> tuple[str, ...]:
    """The names of all methods: those of this package in the order of its tables, then the registered ones.

    >>> from tokenprune_kernels.methods import method_names
    >>> method_names()[:3]
    ('coast', 'sts', 'adafv')
    """
    return tuple(_METHODS)


def get_method(method: str | Method | Choose, *, caller: str = "get_method") -> Method:
    """The description of a method: by its name, or made of a function with the signature of `register_method`.

    Raises:
        ValueError: no method has this name; the message begins with `caller` and lists those there are.
        TypeError: the function does not take k.

    >>> from tokenprune_kernels.methods import get_method
    >>> coast = get_method("coast")
    >>> coast.title, coast.paper, coast.layer, dict(coast.layers)
    ('COAST', '2605.09429', 2, {'Qwen2-VL': 14, 'Qwen2.5-VL': 14, 'Qwen3-VL': 14})
    """
    if isinstance(method, Method):
        return method
    if callable(method):
        return Method(name_of(method), (Stage(method),))
    if not isinstance(method, str) or method not in _METHODS:
        alike = difflib.get_close_matches(str(method).lower(), _METHODS, 1, 0.75)
        instead = f"; type {alike[0]!r}" if alike else ""
        raise ValueError(f"{caller}: method must be one of {', '.join(_METHODS)}, got {method!r}{instead}")
    return _METHODS[method]
