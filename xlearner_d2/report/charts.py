"""Charts as inline SVG, drawn for a phone's width; colours are classes of transfer.css, so they follow its theme."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ..results.study import ROLES, Estimate, role_of
from .markup import drawing, element
from .wording import estimate

_WIDTH = 360
_DASHES = (None, "7 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a chart. ``strong`` stands out; ``goal`` is marked beside the value."""

    label: str
    value: Estimate
    strong: bool = False
    goal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of a backbone: (x, y, seeds). ``strong`` stands out."""

    backbone: str
    points: Sequence[tuple[float, float, int]]
    strong: bool = False

    @property
    def class_(self) -> str:
        return f"curve {role_class(self.backbone)}{' strong' if self.strong else ''}"


def role_class(backbone: str) -> str:
    """The class that gives a backbone its role's colour."""
    role = role_of(backbone)
    return f"role-{role if role in ROLES else 'other'}"


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Multiples of the least round step (1, 2 or 5 times a power of ten) that is met at most so often in a range."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(index * step, 12) for index in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps a range of values to one of positions; of a single value, to its middle."""
    if not high > low:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _text(content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> Element:
    return element("text", content, x=round(x, 1), y=round(y, 1), class_=class_ or None, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    places = {name: round(value, 1) for name, value in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)}
    return element("line", class_=class_, **places)


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _ends(rows: Iterable[Row]) -> list[float]:
    """Everything that must be within a chart."""
    found = [end for row in rows for end in (*(row.value.interval or ()), row.value.mean, row.goal)]
    return [end for end in found if end is not None]


def forest(title: str, description: str, rows: Sequence[Row], *, key: str) -> Element:
    """Differences with their intervals around a line at zero: diamonds for strong rows, dots for the others."""
    left, right, height = 112, 258, 20
    ends = [0.0, *_ends(rows)]
    low, high = min(ends), max(ends)
    x = _scale(low, high, left, right)
    bottom = height * len(rows) + 8
    marks = [_line(x(tick), 4, x(tick), bottom, "grid") for tick in ticks(low, high)]
    marks += [_text(f"{tick:g}".replace("-", "−"), x(tick), bottom + 15, "tick", "middle") for tick in ticks(low, high)]
    marks.append(_line(x(0), 4, x(0), bottom, "zero"))
    for index, row in enumerate(rows):
        marks += _forest_row(row, x, height * (index + 0.5) + 4, right)
    return drawing(title, description, marks, width=_WIDTH, height=bottom + 22, key=key)


def _forest_row(row: Row, x: Callable[[float], float], y: float, right: float) -> list[Element]:
    weight = "strong" if row.strong else ""
    found = [
        _text(_short(row.label, 17), 0, y + 4, weight),
        _text(estimate(row.value, signed=True), _WIDTH, y + 4, weight, "end"),
    ]
    if row.goal is not None:
        found.append(_line(x(row.goal), y - 8, x(row.goal), y + 8, "goal"))
    if row.value.interval:
        low, high = row.value.interval
        found.append(_line(x(low), y, x(high), y, f"whisker {weight}".strip()))
    if row.value.mean is not None:
        centre, size = x(row.value.mean), 6 if row.strong else 3.5
        corners = [(centre - size, y), (centre, y - size), (centre + size, y), (centre, y + size)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        dot = element("circle", cx=round(centre, 1), cy=round(y, 1), r=size, class_="point")
        found.append(element("polygon", points=points, class_="point strong") if row.strong else dot)
    return found


def bars(title: str, description: str, rows: Sequence[Row], *, key: str) -> Element:
    """A bar from zero with its interval for each backbone; its name and value stand above it."""
    height = 36
    top = max([1e-9, *_ends(rows)])
    x = _scale(0, top, 0, _WIDTH - 4)
    marks: list[Element] = []
    for index, row in enumerate(rows):
        y, weight = height * index, "strong" if row.strong else ""
        marks.append(_text(row.label, 0, y + 12, weight))
        marks.append(_text(estimate(row.value), _WIDTH, y + 12, weight, "end"))
        if row.value.mean is not None:
            length = max(0.0, round(x(row.value.mean), 1))
            bar_class = f"bar {role_class(row.label)}"
            marks.append(element("rect", x=0, y=y + 17, width=length, height=11, rx=2, class_=bar_class))
        if row.value.interval:
            low, high = (x(max(0.0, end)) for end in row.value.interval)
            marks.append(_line(low, y + 22.5, high, y + 22.5, "whisker"))
            marks += [_line(end, y + 19, end, y + 26, "whisker") for end in (low, high)]
    return drawing(title, description, marks, width=_WIDTH, height=height * len(rows), key=key)


def curves(title: str, description: str, lines: Sequence[Line], *, key: str) -> Element:
    """Curves by backbone with a legend below; x is logarithmic when it spans more than a factor of twenty.

    Of backbones of one role, which have one colour, those that end highest are drawn, as many as there are dashes.
    """
    lines, left_out = _told_apart(lines)
    left, right, top, bottom = 34.0, _WIDTH - 10.0, 8.0, 190.0
    xs = sorted({x for line in lines for x, _, _ in line.points})
    ys = [y for line in lines for _, y, _ in line.points]
    bend: Callable[[float], float] = math.log10 if xs[0] > 0 and xs[-1] > 20 * xs[0] else float
    straight = _scale(bend(xs[0]), bend(xs[-1]), left + 6, right - 6)
    up = _scale(min(ys), max(ys), bottom - 6, top + 6)

    def across(x: float) -> float:
        return straight(bend(x))

    marks = [_line(left, up(tick), right, up(tick), "grid") for tick in ticks(min(ys), max(ys))]
    marks += [_text(f"{tick:g}", left - 4, up(tick) + 4, "tick", "end") for tick in ticks(min(ys), max(ys))]
    marks += [_text(f"{tick:g}", across(tick), bottom + 15, "tick", "middle") for tick in _apart(xs, across)]
    legend, step = bottom + 34, 18
    for index, (line, dash) in enumerate(_dashed(lines)):
        marks += _curve(line, dash, across, up)
        marks += _legend_entry(line, dash, x=_WIDTH / 2 * (index % 2), y=legend + step * (index // 2))
    if left_out:
        marks.append(_text(f"and {left_out} more, as numbers", 0, legend + step * ((len(lines) + 1) // 2)))
    height = legend + step * ((len(lines) + 1) // 2 + bool(left_out)) - 8
    return drawing(title, description, marks, width=_WIDTH, height=height, key=key)


def _curve(
    line: Line, dash: str | None, across: Callable[[float], float], up: Callable[[float], float]
) -> Iterable[Element]:
    places = [(round(across(x), 1), round(up(y), 1)) for x, y, _ in line.points]
    points = " ".join(f"{x},{y}" for x, y in places)
    yield element("polyline", points=points, class_=line.class_, stroke_dasharray=dash)
    for x, y in places:
        yield element("circle", cx=x, cy=y, r=2.5, class_=line.class_)


def _legend_entry(line: Line, dash: str | None, *, x: float, y: float) -> Iterable[Element]:
    yield element("line", x1=x, y1=y - 4, x2=x + 24, y2=y - 4, class_=line.class_, stroke_dasharray=dash)
    yield _text(_short(line.backbone, 22), x + 29, y, "strong" if line.strong else "")


def _apart(values: Iterable[float], place: Callable[[float], float], gap: float = 34) -> list[float]:
    """Those of sorted values that stand far enough apart to be labelled."""
    found: list[float] = []
    for value in values:
        if not found or place(value) - place(found[-1]) >= gap:
            found.append(value)
    return found


def _told_apart(lines: Sequence[Line]) -> tuple[list[Line], int]:
    """Lines that differ in colour or dashes, and how many were left out for it: never the strong one."""
    by_rank = sorted(lines, key=lambda line: (line.strong, line.points[-1][1]), reverse=True)
    shown, seen = set(), Counter[str]()
    for line in by_rank:
        seen[role_class(line.backbone)] += 1
        if seen[role_class(line.backbone)] <= len(_DASHES):
            shown.add(line.backbone)
    return [line for line in lines if line.backbone in shown], len(lines) - len(shown)


def _dashed(lines: Iterable[Line]) -> Iterable[tuple[Line, str | None]]:
    """Each line with a dash pattern that tells it from others of its colour."""
    seen: Counter[str] = Counter()
    for line in lines:
        colour = role_class(line.backbone)
        yield line, _DASHES[seen[colour]]
        seen[colour] += 1
