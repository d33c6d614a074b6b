"""Links and anchors of Markdown pages, as GitHub reads them."""

import re
from collections.abc import Callable

# Code comes first: what looks like a link or a heading in it is none.
_FENCE = r"^ *(?P<fence>```|~~~).*?^ *(?P=fence) *$"
_LINK = r"!?\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)"
_PARTS = re.compile(rf"{_FENCE}|(?P<link>{_LINK})|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(rf"{_FENCE}|^#{{1,6}} +(?P<heading>[^\n]*)$", re.MULTILINE | re.DOTALL)


def replaced(page: str, new: Callable[[re.Match[str]], str]) -> str:
    """The page with other links; a match has the groups `link`, `text` and `target`."""
    return _PARTS.sub(lambda found: new(found) if found["link"] else found[0], page)


def targets(page: str) -> list[str]:
    """What the links and images of a page lead to."""
    return [found["target"] for found in _PARTS.finditer(page) if found["link"]]


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z]+:|//", target)


def slug(heading: str) -> str:
    """The anchor of a heading, of plain text."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    """Those of all headings; of equal ones the later have a number."""
    found: list[str] = []
    for part in _HEADING.finditer(page):
        if part["heading"] is not None:
            plain = replaced(part["heading"], lambda link: link["text"])
            found.append(slug(plain))
    return {name if (n := found[:at].count(name)) == 0 else f"{name}-{n}" for at, name in enumerate(found)}
