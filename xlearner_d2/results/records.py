"""What one finished cell of a transfer study leaves: a small JSON file, from which all tables and figures are made."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..specs import ConfigError

#: Version of the files' schema (docs/TRANSFER.md).
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One downstream set, one protocol, one backbone, one seed.

    Attributes:
        suite: name of the suite.
        set_name: the downstream set.
        family: classification, detection or segmentation; sets are averaged within their family.
        protocol: what was done with the backbone, such as linear_probe.
        primary: whether this protocol is the one that counts in summaries of the set.
        metric: of ``value``, such as top1, box AP, mIoU.
        backbone: ``role`` or ``role/variant``, such as ``squeezed`` or ``single/caltech``.
        seed: of the transfer and, where the backbone has one per seed, of its pre-training.
        value: in percent; higher is better.
        trivial: the same metric of a predictor that learns nothing from the images; None where none is known.
        details: other figures of this cell, such as the chosen regularisation.
        seconds: wall-clock time of the cell.
        weights: SHA-256 of the backbone's file; "" for random weights.
        settings: SHA-256 of everything in the suite that bears on the cell.
        commit: of the project, with "+" when the tree had changes.
        hardware: processor or GPU, in words.
        date: when the cell was finished (ISO 8601).
    """

    suite: str
    set_name: str
    family: str
    protocol: str
    metric: str
    backbone: str
    seed: int
    value: float
    trivial: float | None
    details: Mapping[str, Any]
    seconds: float
    weights: str
    settings: str
    commit: str
    hardware: str
    date: str
    primary: bool = False

    @property
    def role(self) -> str:
        """What kind of backbone it is: random, single, shared, separate, expanded, squeezed, or the user's own."""
        return self.backbone.partition("/")[0]


def cell_file(folder: str | Path, *, set_name: str, protocol: str, backbone: str, seed: int) -> Path:
    """Where the record of a cell belongs, below a study's folder."""
    return Path(folder) / "cells" / set_name / protocol / f"{backbone.replace('/', '.')}-{seed}.json"


def write_record(record: CellRecord, path: Path) -> None:
    """Write atomically: a reader sees the whole record or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_record(path: Path) -> CellRecord:
    """Read one record.

    Raises:
        ConfigError: naming the file, when it is no record of this schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.pop("schema")
        if version != SCHEMA:
            raise ConfigError([f"{path} has schema {version}, but {SCHEMA} is expected."])
        missing = {field.name for field in fields(CellRecord)} ^ set(found)
        if missing:
            raise ConfigError([f"{path} lacks or has in excess: {', '.join(sorted(missing))}."])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} is no record of a transfer cell: {error!r}."]) from error
    return CellRecord(**found)


def read_records(folder: str | Path) -> list[CellRecord]:
    """All records below a study's folder, in order of their paths."""
    return [read_record(path) for path in sorted(Path(folder).glob("cells/*/*/*.json"))]
