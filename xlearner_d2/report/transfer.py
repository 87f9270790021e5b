"""From the folders of a transfer study to results.json, tables.md and report.html."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..results.consistency import cell_key
from ..results.records import CellRecord, read_record
from ..results.statistics import analyse
from ..results.study import Goal, Study
from ..specs import ConfigError
from .transfer_page import render
from .transfer_tables import all_markdown

#: Version of results.json (docs/TRANSFER.md).
VERSION = 2


def read_studies(folders: Iterable[str | Path]) -> list[CellRecord]:
    """The records of one study whose cells may have been finished in several places.

    A cell that is in several folders must be the same in all but time, place and details; the first one is taken.

    Raises:
        ConfigError: listing folders without cells, files that are no records, and pairs of files that disagree.
    """
    problems: list[str] = []
    found: dict[tuple[str, str, str, int], tuple[Path, CellRecord]] = {}
    for folder in folders:
        paths = sorted(Path(folder).glob("cells/*/*/*.json"))
        if not paths:
            problems.append(f"{folder} has no cells: files cells/SET/PROTOCOL/BACKBONE-SEED.json are expected.")
        for path in paths:
            try:
                record = read_record(path)
            except ConfigError as error:
                problems += error.problems
                continue
            first_path, first = found.setdefault(cell_key(record), (path, record))
            if _measured(first) != _measured(record):
                problems.append(_disagreement(first_path, first, path, record))
    if problems:
        raise ConfigError(problems, what="The transfer study")
    return [record for _, record in found.values()]


def _measured(record: CellRecord) -> CellRecord:
    """Without what may differ between two measurements of one cell."""
    return replace(record, details={}, seconds=0.0, commit="", hardware="", date="")


def _disagreement(first_path: Path, first: CellRecord, path: Path, record: CellRecord) -> str:
    one, other = asdict(_measured(first)), asdict(_measured(record))
    what = ", ".join(f"{name} {one[name]!r} and {other[name]!r}" for name in one if one[name] != other[name])
    return f"{first_path} and {path} are of the same cell, but have {what}: keep one of them."


def choose_primary(records: Iterable[CellRecord], preference: Sequence[str]) -> dict[str, str]:
    """Set -> the first of the protocols in order of preference that it has; sets that have none are left out.

    Raises:
        ConfigError: for a protocol that no set has.
    """
    protocols: dict[str, set[str]] = {}
    for record in records:
        protocols.setdefault(record.set_name, set()).add(record.protocol)
    known = set().union(*protocols.values())
    unknown = [name for name in preference if name not in known]
    if unknown:
        problem = f"No set has the protocol {', '.join(unknown)}; there are {', '.join(sorted(known))}."
        raise ConfigError([problem], what="The transfer study")
    choices = {name: [item for item in preference if item in found] for name, found in protocols.items()}
    return {name: found[0] for name, found in choices.items() if found}


def report_folder(folder: str | Path, *, subject: str) -> Path:
    """Report on the cells of one folder, in it.

    Args:
        subject: the backbone, or role of one backbone, that is judged.

    Returns:
        the page.
    """
    records = read_studies([folder])
    write_report(analyse(records, subject=subject), records, folder)
    return Path(folder) / "report.html"


def write_report(study: Study, records: Sequence[CellRecord], output: str | Path) -> None:
    """Write results.json, tables.md and report.html, each wholly or not at all, into a folder, which is created."""
    records = sorted(records, key=cell_key)
    _write(Path(output) / "results.json", results_text(study, records))
    _write(Path(output) / "tables.md", all_markdown(study, records))
    _write(Path(output) / "report.html", render(study, records))


def results_text(study: Study, records: Iterable[CellRecord]) -> str:
    """Content of results.json: the study and all its cells."""
    cells = [{**asdict(record), "details": _plain(record.details)} for record in records]
    content = {"version": VERSION, **asdict(study), "cells": cells}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """With null for what JSON has no number for, such as the loss of a run that diverged."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_results(path: str | Path) -> tuple[Study, list[CellRecord]]:
    """Read results.json; the statistics are computed again from its cells, subject, primary protocols and goals.

    Raises:
        ConfigError: naming the file, when it is no such file of this version, and as :func:`analyse`.
    """
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version = found["version"]
        if version != VERSION:
            raise ConfigError([f"{path} has version {version}, but {VERSION} is expected."], what="The transfer study")
        records = [CellRecord(**cell) for cell in found["cells"]]
        goals = [Goal(**verdict["goal"]) for verdict in found["verdicts"]]
        subject, primary = found["subject"], found["primary"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"{path} is no result of a transfer study: {error!r}."], what="The transfer study"
        ) from error
    return analyse(records, subject=subject, primary=primary, goals=goals), records


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
