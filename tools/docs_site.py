"""What `make docs` does beyond MkDocs: pages from outside docs/, links between them, and nothing loaded from elsewhere.

A hook of mkdocs.yml. The repository's own links work in both places: README.md is the site's first page, and
datasets/README.md and the notebook are pages of it.
"""

import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Path in the repository -> path in the site, of what is not in docs/.
OUTSIDE = {
    "README.md": "index.md",
    "datasets/README.md": "datasets/README.md",
    "benchmarks/results/scaling.png": "benchmarks/results/scaling.png",
}
NOTEBOOK = "docs/tutorial.ipynb"
NOTEBOOK_PAGE = "TUTORIAL.md"
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#\s])")
#: Attributes by which a page makes a browser load something at once.
_LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("source", "srcset")}
_LINKED = {"stylesheet", "preconnect", "preload", "prefetch", "dns-prefetch", "icon", "modulepreload", "manifest"}


def site_path(repository_path: str) -> str:
    """Where a file of the repository is in the site; unchanged if it is not there."""
    known = {**OUTSIDE, NOTEBOOK: NOTEBOOK_PAGE}
    return known.get(repository_path, repository_path.removeprefix("docs/"))


def rewrite_links(markdown: str, repository_path: str) -> str:
    """Links to files as the site has them, of a page as the repository has it."""
    folder, here = posixpath.dirname(repository_path), posixpath.dirname(site_path(repository_path))

    def target(match: re.Match[str]) -> str:
        return posixpath.relpath(site_path(posixpath.normpath(posixpath.join(folder, match[1]))), here or ".")

    return _LINK.sub(target, markdown)


def notebook_page(content: str) -> str:
    """A notebook without outputs as a page."""
    parts = []
    for cell in json.loads(content)["cells"]:
        text = "".join(cell["source"]).strip()
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside docs/."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    notebook = (ROOT / NOTEBOOK).read_text(encoding="utf-8")
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links follow."""
    places = {target: source for source, target in OUTSIDE.items()}
    return rewrite_links(markdown, places.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


class Docstrings(griffe.Extension):
    """Makes of each docstring what the API page needs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = without_roles(split_names(obj.docstring.value))


def split_names(docstring: str) -> str:
    """``mean, std: three numbers`` as an entry for each, with the lines that continue it."""
    entry = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +\S.*)*)", re.MULTILINE)
    return entry.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), docstring)


def without_roles(docstring: str) -> str:
    """``:func:`name` `` as ``name``."""
    return re.sub(r":\w+:(?=`)", "", docstring)


class _Loads(HTMLParser):
    """Collects what a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        urls = [values[name] for name in values if (tag, name) in _LOADS]
        if tag == "link" and _LINKED & set(values.get("rel", "").split()):
            urls.append(values.get("href", ""))
        self.found += [url for url in urls if re.match(r"(https?:)?//", url)]


def foreign_loads(site: Path) -> list[str]:
    """Everything in a built site that a browser would load from another host, as ``page: address``."""
    found = []
    for path in sorted(site.rglob("*.html")):
        parser = _Loads()
        parser.feed(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: {url}" for url in parser.found]
    for path in sorted(site.rglob("*.css")):
        urls = re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: {url}" for url in urls]
    return found


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page needs the network.

    Raises:
        PluginError: naming pages and addresses.
    """
    found = foreign_loads(Path(config.site_dir))
    if found:
        raise PluginError("The site loads from elsewhere:\n" + "\n".join(found))
