"""What keeps the records of a study from being put together."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from .records import CellRecord
from .study import OVERALL


def record_problems(records: Sequence[CellRecord]) -> list[str]:
    """All problems of a study's records, among them two records for one cell."""
    if not records:
        return ["It has no cell: run some before the report."]
    repeated = [
        f"{_name(key)} has {count} records, but one is expected."
        for key, count in Counter(map(cell_key, records)).items()
        if count > 1
    ]
    return [*(problem for record in records for problem in _figures(record)), *repeated, *_contradictions(records)]


def cell_key(record: CellRecord) -> tuple[str, str, str, int]:
    """What a cell is known by: set, protocol, backbone, seed."""
    return record.set_name, record.protocol, record.backbone, record.seed


def curve_of(record: CellRecord) -> Sequence[Any]:
    """Points [x, y] of the cell, such as the metric by the number of training images; empty without."""
    return record.details.get("curve", ())


def _name(key: tuple[str, str, str, int]) -> str:
    return "/".join(map(str, key))


def _finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _figures(record: CellRecord) -> Iterator[str]:
    where = _name(cell_key(record))
    for name in ("value", "trivial", "seconds"):
        value = getattr(record, name)
        if not (_finite(value) or (name == "trivial" and value is None)):
            yield f"{where}: its {name} is {value!r}, but a finite number is expected."
    if not isinstance(record.seed, int):
        yield f"{where}: its seed is {record.seed!r}, but an integer is expected."
    points = curve_of(record)
    if not isinstance(points, Sequence) or not all(map(_is_pair, points)):
        yield f"{where}: its curve is not a list of pairs [x, y] of finite numbers."


def _is_pair(point: Any) -> bool:
    return isinstance(point, Sequence) and len(point) == 2 and all(map(_finite, point))


def _contradictions(records: Sequence[CellRecord]) -> Iterator[str]:
    """What must be the same in all cells of a set, of a set under a protocol, or of a backbone with a seed."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        measured = f"{record.set_name}/{record.protocol}"
        found["family", record.set_name].add(record.family)
        found["metric", measured].add(record.metric)
        found["settings", measured].add(record.settings)
        found["weights", f"{record.backbone}, seed {record.seed},"].add(record.weights)
    for (what, name), values in found.items():
        if len(values) > 1:
            shown = ", ".join(value[:16] or "none" for value in sorted(values))
            yield f"{name} has cells of different {what}, which cannot be compared: {shown}."
        if what == "family" and OVERALL in values:
            yield f"{name} has the family {OVERALL!r}, which is the name of the mean over all families."
