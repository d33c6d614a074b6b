"""The docstrings as Markdown, for the API of the documentation site: an extension of griffe (mkdocs.yml)."""

import re
import textwrap
from collections.abc import Collection
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>>.*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
_ENTRY = re.compile(r"^((?:[\w*]+,\s+)*[\w*]+):", re.MULTILINE)


def names_of(entry: str) -> list[str]:
    return re.split(r",\s+", entry)


def entries(text: str) -> str:
    """Each `name: text`, with `a, b: text` for several names, as an item of a list."""
    return _ENTRY.sub(lambda entry: "- " + ", ".join(f"`{name}`" for name in names_of(entry[1])) + ":", text)


def as_markdown(docstring: str, names: Collection[str]) -> str:
    """Sections, fields that are explained line by line, and examples, each as Markdown has it."""

    def section(found: re.Match[str]) -> str:
        text = textwrap.dedent(found[2])
        return f"**{found[1]}**\n\n{text if found[1] == 'Returns' else entries(text)}\n"

    def fields(found: re.Match[str]) -> str:
        explained = _ENTRY.match(found[0])
        return entries(found[0]) if explained and set(names_of(explained[1])) <= set(names) else found[0]

    docstring = re.sub(
        r"^Example:\n((?:    .*\n?)+)", lambda found: textwrap.dedent(found[1]), docstring, flags=re.MULTILINE
    )
    docstring = _SECTION.sub(section, docstring)
    docstring = re.sub(r"^\w.*(?:\n    .*)*(?:\n\w.*(?:\n    .*)*)*", fields, docstring, flags=re.MULTILINE)
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            parameters = getattr(obj, "parameters", ())
            names = {*obj.members, *(parameter.name for parameter in parameters)}
            obj.docstring.value = as_markdown(obj.docstring.value, names)
