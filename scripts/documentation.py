"""What the documentation site has besides docs/: pages of the root, the API, links into the repository (mkdocs.yml)."""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from testing import ROOT, links
from testing.docstrings import as_markdown

# Pages that are somewhere else in the repository, by their place in the site.
ROOT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PLACES = {source: page for page, source in ROOT_PAGES.items()}
# What each page of the API documents: a package, by its `__all__`.
API = {
    "api/ops.md": ("Ops", "tokenprune_kernels/ops"),
    "api/package.md": ("The package", "tokenprune_kernels"),
    "api/methods.md": ("Methods", "tokenprune_kernels/methods"),
    "api/transformers.md": ("Inside transformers", "tokenprune_kernels/integrations/transformers"),
    "api/vllm.md": ("Inside vLLM", "tokenprune_kernels/integrations/vllm"),
    "api/distributed.md": ("Several processes", "tokenprune_kernels/distributed"),
}


def exported(package: Path) -> list[str]:
    """The functions and classes in `__all__` of a package, each by the module that it is imported from."""
    tree = ast.parse((package / "__init__.py").read_text())
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    modules = {
        name.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for name in node.names
    }
    dotted = ".".join(package.relative_to(ROOT).parts)
    here = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return [
        f"{dotted}.{modules[name]}.{name}" if name in modules else f"{dotted}.{name}"
        for name in ast.literal_eval(assigned["__all__"])
        if (name in modules or name in here) and not name.isupper() and not name.startswith("_")
    ]


def api_page(title: str, package: Path) -> str:
    """A page for mkdocstrings, which writes what stands behind each `:::`."""
    introduction = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    return "\n\n".join([f"# {title}", introduction or "", *(f"::: {name}" for name in exported(package))]) + "\n"


def expanded(nav: Any) -> Any:
    """The navigation with all pages of a folder in the place of a pattern such as kernels/*.md."""
    if isinstance(nav, dict):
        return {title: expanded(part) for title, part in nav.items()}
    if isinstance(nav, list):
        return [entry for part in nav for entry in (pages(part) if "*" in part else [expanded(part)])]
    return nav


def pages(pattern: str) -> list[str]:
    return [page.relative_to(ROOT / "docs").as_posix() for page in sorted((ROOT / "docs").glob(pattern))]


def leads_to(target: str, page: str, repository: str | None) -> str | None:
    """A link of a page, both by their places in the repository, as the site has it; None where it leads nowhere."""
    path, _, anchor = target.partition("#")
    if not path or not links.is_relative(target):
        return target
    file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if file in PLACES or file.startswith("docs/"):
        there, here = (PLACES.get(name, name.removeprefix("docs/")) for name in (file, page))
        return posixpath.relpath(there, posixpath.dirname(here) or ".") + (f"#{anchor}" if anchor else "")
    if not repository:
        return None
    kind = "tree" if (ROOT / file).is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/main/{file}" + (f"#{anchor}" if anchor else "")


class Docstrings(griffe.Extension):
    """Reads the docstrings, for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            parameters = getattr(obj, "parameters", ())
            names = {*obj.members, *(parameter.name for parameter in parameters)}
            obj.docstring.value = as_markdown(obj.docstring.value, names)


# --- called by mkdocs ---------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = expanded(config.nav)
    # Anchors as on GitHub, for which the pages were written.
    config.mdx_configs["toc"]["slugify"] = lambda heading, separator: links.slug(heading)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, (title, package) in API.items():
        files.append(File.generated(config, page, content=api_page(title, ROOT / package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = ROOT_PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def new(link: re.Match[str]) -> str:
        target = leads_to(link["target"], source, config.repo_url)
        return link["text"] if target is None else link["link"].replace(f"]({link['target']})", f"]({target})")

    return links.replaced(markdown, new)
