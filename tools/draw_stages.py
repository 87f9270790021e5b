"""Draw docs/assets/stages.svg: the two stages in one picture.

python tools/draw_stages.py [--check]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, indent, tostring

from xlearner_d2.report.markup import Child, drawing, element

OUTPUT = Path(__file__).resolve().parents[1] / "docs/assets/stages.svg"
WIDTH, HEIGHT = 720, 650
STAGES = ("res2", "res3", "res4", "res5")
#: Task, colour, and the sources that share its branch.
BRANCHES = (
    ("classification", "#1b6ca8", ("image labels",)),
    ("detection", "#b3541e", ("boxes", "masks")),
    ("segmentation", "#3f7d20", ("label maps",)),
)
STUDENT = "#5b3a8c"
INK, PALE = "#222222", "#777777"
STAGE_X, STAGE_STEP, STAGE_WIDTH, STAGE_HEIGHT = 178, 100, 64, 40
HEAD_X, HEAD_WIDTH = 584, 114
TITLE = "The two stages of X-Learner"
DESCRIPTION = (
    "Expand: a ResNet branch for each task, a head for each source; after res2, res3 and res4 each branch receives the "
    "others' features through reconciliation layers. Squeeze: one plain ResNet, the student, learns from the branches' "
    "features at res4 and res5 and from all labels, and is exported."
)


def text(content: str, x: float, y: float, *, size: int = 16, colour: str = INK, **more: str) -> Element:
    more.setdefault("text_anchor", "middle")
    return element("text", content, x=x, y=y, font_size=size, fill=colour, **more)


def box(
    x: float, y: float, width: float, height: float, label: str, colour: str, *, filled: bool = True
) -> Iterator[Child]:
    fill, ink = (colour, "#ffffff") if filled else ("#ffffff", colour)
    yield element("rect", x=x, y=y, width=width, height=height, rx=6, fill=fill, stroke=colour, stroke_width=2)
    yield text(label, x + width / 2, y + height / 2 + 5.5, colour=ink)


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = PALE, **more: str) -> Element:
    return element(
        "path",
        d=f"M{x1:g} {y1:g}L{x2:g} {y2:g}",
        stroke=colour,
        stroke_width=2,
        fill="none",
        marker_end="url(#tip)",
        **more,
    )


def resnet(y: float, colour: str) -> Iterator[Child]:
    """Four stages from left to right, and what joins them."""
    middle = y + STAGE_HEIGHT / 2
    for index, stage in enumerate(STAGES):
        x = STAGE_X + index * STAGE_STEP
        yield arrow(x - STAGE_STEP + STAGE_WIDTH if index else x - 22, middle, x - 4, middle)
        yield from box(x, y, STAGE_WIDTH, STAGE_HEIGHT, stage, colour)


def heads(y: float, colour: str, labels: tuple[str, ...]) -> Iterator[Child]:
    """One head for each source, right of res5."""
    start, middle = STAGE_X + 3 * STAGE_STEP + STAGE_WIDTH, y + STAGE_HEIGHT / 2
    height = 30 if len(labels) > 1 else STAGE_HEIGHT
    for index, label in enumerate(labels):
        top = middle - height / 2 + (index - (len(labels) - 1) / 2) * (height + 8)
        yield arrow(start, middle, HEAD_X - 4, top + height / 2)
        yield from box(HEAD_X, top, HEAD_WIDTH, height, label, colour, filled=False)


def reconciliation(rows: tuple[float, ...]) -> Iterator[Child]:
    """After res2, res3 and res4: every branch adds what it receives from all others."""
    for index in range(3):
        x = STAGE_X + index * STAGE_STEP + STAGE_WIDTH + (STAGE_STEP - STAGE_WIDTH) / 2 - 2
        middles = [row + STAGE_HEIGHT / 2 for row in rows]
        yield element(
            "path", d=f"M{x:g} {middles[0]:g}V{middles[-1]:g}", stroke=INK, stroke_width=2, stroke_dasharray="4 4"
        )
        for middle in middles:
            yield element("circle", cx=x, cy=middle, r=9, fill="#ffffff", stroke=INK, stroke_width=2)
            yield element(
                "path",
                d=f"M{x - 5:g} {middle:g}H{x + 5:g}M{x:g} {middle - 5:g}V{middle + 5:g}",
                stroke=INK,
                stroke_width=2,
            )


def expand(top: float) -> Iterator[Child]:
    yield text(
        "1  Expand: a branch for each task, a head for each source",
        24,
        top,
        size=20,
        text_anchor="start",
        font_weight="bold",
    )
    rows = tuple(top + 34 + index * 82 for index in range(len(BRANCHES)))
    for y, (task, colour, labels) in zip(rows, BRANCHES, strict=True):
        yield text(task, 24, y + STAGE_HEIGHT / 2 + 5, colour=colour, text_anchor="start", font_weight="bold")
        yield from resnet(y, colour)
        yield from heads(y, colour, labels)
    yield from reconciliation(rows)
    note = "⊕  reconciliation layers: the other branches' features are added, without gradient"
    yield text(note, 24, rows[-1] + 72, colour=PALE, text_anchor="start")


def squeeze(top: float) -> Iterator[Child]:
    yield text(
        "2  Squeeze: all branches teach one plain ResNet", 24, top, size=20, text_anchor="start", font_weight="bold"
    )
    y = top + 138
    for index, (task, colour, _) in enumerate(BRANCHES):
        x = 178 + index * 180
        yield from box(x, top + 24, 160, 34, f"{task}", colour)
        for stage in (2, 3):
            yield arrow(
                x + 80, top + 58, STAGE_X + stage * STAGE_STEP + STAGE_WIDTH / 2, y - 6, colour, stroke_dasharray="6 4"
            )
    yield text("branches, frozen", 24, top + 46, colour=PALE, text_anchor="start")
    yield text("hints", 24, top + 100, colour=PALE, text_anchor="start")
    yield text("student", 24, y + STAGE_HEIGHT / 2 + 5, colour=STUDENT, text_anchor="start", font_weight="bold")
    yield from resnet(y, STUDENT)
    yield from heads(y, STUDENT, ("all labels",))
    middle = STAGE_X + 1.5 * STAGE_STEP + STAGE_WIDTH / 2
    yield arrow(middle, y + STAGE_HEIGHT + 6, middle, y + STAGE_HEIGHT + 34, STUDENT)
    yield text(
        "student_d2.pth: MODEL.WEIGHTS of any Detectron2 config of its depth",
        middle,
        y + STAGE_HEIGHT + 60,
        colour=STUDENT,
    )


def draw() -> str:
    """The picture, as the text of an SVG file."""
    tip = element(
        "marker",
        element("path", d="M0 0L8 4L0 8z", fill="context-stroke"),
        id="tip",
        viewBox="0 0 8 8",
        refX=6,
        refY=4,
        markerWidth=7,
        markerHeight=7,
        orient="auto",
        markerUnits="userSpaceOnUse",
    )
    paper = element("rect", width=WIDTH, height=HEIGHT, rx=12, fill="#ffffff")
    svg = drawing(
        TITLE,
        DESCRIPTION,
        element("defs", tip),
        paper,
        expand(40),
        squeeze(374),
        width=WIDTH,
        height=HEIGHT,
        key="stages",
    )
    svg.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": "Helvetica, Arial, sans-serif"}
    indent(svg)
    return tostring(svg, encoding="unicode") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the picture is not up to date")
    if parser.parse_args().check:
        if not OUTPUT.is_file() or OUTPUT.read_text(encoding="utf-8") != draw():
            sys.exit(f"{OUTPUT} is not up to date: run python tools/draw_stages.py")
        return
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
