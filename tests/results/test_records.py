"""Records of cells: what is written is what is read, and what is no record is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.results.records import CellRecord, cell_file, read_record, read_records, write_record
from xlearner_d2.specs import ConfigError

RECORD = CellRecord(
    suite="tiny",
    set_name="pets",
    family="classification",
    protocol="probe",
    metric="top1",
    backbone="single/icons",
    seed=3,
    value=61.25,
    trivial=10.0,
    details={"c": 0.1, "losses": [2.0, 1.5]},
    seconds=1.5,
    weights="ab12",
    settings="cd34",
    commit="abc+",
    hardware="Prozessor™, 2 threads",
    date="2026-01-01T00:00:00+00:00",
)
NUMBERS = st.floats(allow_nan=False)
DETAILS = st.dictionaries(st.text(), st.integers() | NUMBERS | st.text() | st.booleans() | st.lists(NUMBERS))


def file_of(record: CellRecord, folder: Path) -> Path:
    cell = {"set_name": record.set_name, "protocol": record.protocol, "seed": record.seed}
    return cell_file(folder, backbone=record.backbone, **cell)


@settings(max_examples=25, deadline=None)
@given(value=NUMBERS, details=DETAILS, hardware=st.text())
def test_records_round_trip(
    tmp_path_factory: pytest.TempPathFactory, value: float, details: dict[str, object], hardware: str
) -> None:
    path = tmp_path_factory.mktemp("records") / "record.json"
    record = replace(RECORD, value=value, details=details, hardware=hardware)
    write_record(record, path)
    assert read_record(path) == record


def test_an_undefined_value_stays_undefined(tmp_path: Path) -> None:
    write_record(replace(RECORD, trivial=None), tmp_path / "record.json")
    assert read_record(tmp_path / "record.json").trivial is None


def test_all_records_of_a_folder_are_found_and_nothing_else(tmp_path: Path) -> None:
    records = [replace(RECORD, backbone=name, seed=seed) for name in ("random", "single/icons") for seed in (0, 1)]
    for record in records:
        write_record(record, file_of(record, tmp_path))
    file_of(RECORD, tmp_path).with_name(".random-7.json.123.part").write_text("half a rec")
    assert read_records(tmp_path) == records
    assert read_records(tmp_path / "nothing") == []


def test_writing_replaces(tmp_path: Path) -> None:
    path = file_of(RECORD, tmp_path)
    assert path == tmp_path / "cells/pets/probe/single.icons-3.json"
    for value in (1.0, 2.0):
        write_record(replace(RECORD, value=value), path)
    assert read_record(path).value == 2.0
    assert list(path.parent.iterdir()) == [path]


def test_role_is_the_first_part_of_the_name() -> None:
    assert RECORD.role == "single"
    assert replace(RECORD, backbone="squeezed").role == "squeezed"


BROKEN = {
    "cut short": (lambda text: text[: len(text) // 2], "is no record of a transfer cell: JSONDecodeError"),
    "bytes": (lambda text: b"\xff\xfe\x00", "is no record of a transfer cell: UnicodeDecodeError"),
    "list": (lambda text: "[1, 2]", "is no record of a transfer cell: TypeError"),
    "number": (lambda text: "7", "is no record of a transfer cell: AttributeError"),
    "no version": (lambda text: "{}", r"is no record of a transfer cell: KeyError\('schema'\)"),
    "other version": (lambda text: text.replace('"schema": 1', '"schema": 2'), "has schema 2, but 1 is expected"),
    "lacking": (lambda text: text.replace('"seed"', '"sead"'), "lacks or has in excess: sead, seed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_record_is_named(tmp_path: Path, name: str) -> None:
    spoil, message = BROKEN[name]
    path = file_of(RECORD, tmp_path)
    write_record(RECORD, path)
    assert json.loads(path.read_text())["schema"] == 1
    spoilt = spoil(path.read_text())
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    with pytest.raises(ConfigError, match=rf"single\.icons-3\.json {message}"):
        read_records(tmp_path)
