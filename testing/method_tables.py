"""The tables of docs/methods.md and docs/transformers.md that follow from the descriptions of the methods."""

from collections.abc import Iterable

from tokenprune_kernels.methods import ARGUMENTS, Method, get_method, method_names
from tokenprune_kernels.methods._method import EVIDENCE


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _published() -> list[Method]:
    return [get_method(name) for name in method_names()]


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def faithful_to() -> str:
    """The table of docs/methods.md: which functions there are, and what each was written from."""
    return table(
        ("function", "paper", "faithful to"),
        (
            (
                code(stage.name for stage in method.stages),
                f"{method.title}, arXiv {method.paper}" if method.paper else method.title,
                ", ".join(filter(None, ("a baseline" if method.baseline else "", method.source))),
            )
            for method in _published()
        ),
    )


def bibtex() -> str:
    """The entries of docs/methods.md: what the descriptions know of the papers, and nothing guessed."""
    entries = []
    for method in filter(lambda method: method.paper, _published()):
        year, month = 2000 + int(method.paper[:2]), int(method.paper[2:4])
        fields = {
            # What is only in the style of a paper still cites the paper.
            "title": "{" + method.title.removesuffix("-style") + "}",
            "author": method.authors,
            "year": str(year),
            "month": str(month),
            "eprint": method.paper,
            "archivePrefix": "arXiv",
        }
        lines = (f"  {name} = {{{value}}}" for name, value in fields.items() if value)
        entries.append(f"@misc{{{method.name},\n" + ",\n".join(lines) + "\n}")
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"


def _where(method: Method) -> str:
    if method.schedule:
        stages = " and ".join(f"{layer} ({share})" for layer, share in method.schedule.items())
        return f"in front of layers {stages} of {method.depth}"
    layers = dict.fromkeys(method.layers.values())
    others = [f"{', '.join(f for f, at in method.layers.items() if at == layer)}: {layer}" for layer in layers]
    layer = f"layer {method.layer}" + (f" ({'; '.join(others)})" if others else "")
    where = [layer if stage.at_layer(None) else "the language model" for stage in method.stages]
    shares = ["" if stage.share == 1 else f" ({stage.share} `keep`)" for stage in method.stages]
    return "in front of " + ", then of ".join(map("".join, zip(where, shares, strict=True)))


def where_and_by_what() -> str:
    """The table of docs/transformers.md: where each method prunes, and what it asks for."""
    return table(
        ("method", "where", "chooses by", "positions"),
        (
            (
                f"`{method.name}`",
                _where(method),
                "; then ".join(code(name for name in EVIDENCE if name in stage.uses) for stage in method.stages),
                method.positions if method.positions == "original" else "renumbered; mRoPE: original",
            )
            for method in _published()
        ),
    )


def arguments() -> str:
    """The table of docs/transformers.md: what a function may ask for."""
    return table(("parameter", "what it is given"), ((f"`{name}`", text) for name, text in ARGUMENTS.items()))
