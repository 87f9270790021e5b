"""HTML and SVG as element trees, so that every name in them is escaped and every tag is closed."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "str | Element | Iterable[Child] | None"


def element(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """An element: ``element("td", "3.1", class_="number")``.

    Args:
        children: text, elements, and iterables of both; None is nothing.
        attributes: an underscore stands for a hyphen, one at the end for nothing; None leaves the attribute out.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    found = Element(
        tag, {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in named.items()}
    )
    _append(found, children)
    return found


def _append(parent: Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif isinstance(child, str) and len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        elif isinstance(child, str):
            parent.text = (parent.text or "") + child
        elif child is not None:
            _append(parent, child)


def drawing(title: str, description: str, *children: Child, width: float, height: float, key: str) -> Element:
    """An inline SVG that scales with the page and tells its content in words; ``key`` is unique in the page."""
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", description, id=f"{key}-desc"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def table(caption: Child, header: Sequence[str], rows: Iterable[Iterable[Child]], *, words: int = 1) -> Element:
    """A table in a box of its own that scrolls sideways; the first cell of a row is its header.

    Args:
        caption: stays in view when the table is scrolled.
        rows: a ``td`` element as a cell is taken as it is.
        words: how many columns from the left are words, not numbers.
    """
    head = (
        element("th", _breakable(name), scope="col", class_=_word(index, words)) for index, name in enumerate(header)
    )
    body = (element("tr", (_cell(cell, index, words) for index, cell in enumerate(row))) for row in rows)
    found = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", head)),
        element("tbody", body),
    )
    # What scrolls can be reached with the keyboard, and says what it is.
    return element("div", found, class_="scroll", tabindex="0", role="group", aria_label="".join(found[0].itertext()))


def _breakable(name: str) -> Iterable[Child]:
    """The name, which may go on in a new line after each slash."""
    *starts, end = name.split("/")
    return [*((f"{start}/", element("wbr")) for start in starts), end]


def _word(index: int, words: int) -> str | None:
    return "word" if index < words else None


def _cell(cell: Child, index: int, words: int) -> Element:
    if isinstance(cell, Element) and cell.tag == "td":
        return cell
    return (
        element("th", cell, scope="row", class_="word")
        if index == 0
        else element("td", cell, class_=_word(index, words))
    )


def page(title: str, style: str, *children: Child) -> str:
    """A whole page that needs nothing but itself."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    root = element("html", head, element("body", *children), lang="en")
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
