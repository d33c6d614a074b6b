"""Docstrings as the Markdown of the documentation site."""

import re
import textwrap
from collections.abc import Collection

_EXAMPLE = re.compile(r"^>>>.*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
_ENTRY = re.compile(r"^((?:[\w*]+,\s+)*[\w*]+):", re.MULTILINE)


def names_of(entry: str) -> list[str]:
    return re.split(r",\s+", entry)


def entries(text: str) -> str:
    """Each `name: text`, with `a, b: text` for several names, as an item of a list."""
    return _ENTRY.sub(lambda entry: "- " + ", ".join(f"`{name}`" for name in names_of(entry[1])) + ":", text)


def as_markdown(docstring: str, names: Collection[str]) -> str:
    """Sections, fields that are explained line by line, and examples, each as Markdown has it."""

    def section(found: re.Match[str]) -> str:
        title, text = found[1], textwrap.dedent(found[2])
        if title == "Example":
            return text
        return f"**{title}**\n\n{text if title == 'Returns' else entries(text)}\n"

    def fields(found: re.Match[str]) -> str:
        explained = _ENTRY.match(found[0])
        return entries(found[0]) if explained and set(names_of(explained[1])) <= set(names) else found[0]

    docstring = _SECTION.sub(section, docstring)
    docstring = re.sub(r"^\w.*(?:\n    .*)*(?:\n\w.*(?:\n    .*)*)*", fields, docstring, flags=re.MULTILINE)
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)
