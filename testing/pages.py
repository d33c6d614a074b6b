"""Generated sections of Markdown pages: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

import re


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"(<!-- begin {re.escape(name)} -->\n)(.*?)(<!-- end {re.escape(name)} -->)", re.DOTALL)


def section(text: str, name: str) -> str:
    """What a page has in that section, without the line break before its end."""
    found = _pattern(name).search(text)
    if not found:
        raise SystemExit(f"there is no section {name}")
    return found.group(2).removesuffix("\n")


def fill(text: str, name: str, content: str) -> str:
    """The page with other content in that section."""
    section(text, name)
    return _pattern(name).sub(lambda found: f"{found.group(1)}{content}\n{found.group(3)}", text)
