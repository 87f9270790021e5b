"""Image classification: a csv or text file with one image a line, followed by its label or labels."""

import csv
import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from ...specs import DatasetSpec, nearest
from ..problems import Problems
from .common import Records, add_to_catalogs, fail, find_folder, pillow_suffixes, raise_if_any, read_text, subject
from .label_names import LabelIndex, find_classes

#: Names of columns, in lower case, that need no ``COLUMNS``.
_PATH_NAMES = ("path", "file_name", "filename", "file", "filepath", "file_path", "image", "image_path", "image_name")
_LABEL_NAMES = ("label", "labels", "class", "classes", "category", "class_name", "class_id", "target", "tags")
_SUFFIXES = "|".join(map(re.escape, IMG_EXTENSIONS))
#: "path with spaces.jpg label": the path ends at the first suffix of an image that a space follows.
_SPACED = re.compile(rf"(?P<path>.*?(?:{_SUFFIXES})) +(?P<label>[^\s,;][^\t]*)", re.IGNORECASE)
_DELIMITERS = "\t,;"


class Row(NamedTuple):
    """An image of the list: the line it is in, its path and its labels as they are written."""

    line: int
    path: str
    labels: tuple[str, ...]


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``image_list``. The list is read here, as it has the classes.

    Raises:
        ConfigError: for a missing list, column or folder, malformed lines, images listed twice, or unknown labels.
    """
    file = root / spec.list
    folder = find_folder(spec, "IMAGES", root / spec.images) if spec.images else file.parent
    rows = _read_rows(spec, file)
    classes = find_classes(spec, root, (label for row in rows for label in row.labels))
    if not spec.classes:
        _check_separators(spec, file, classes)
    add_to_catalogs(
        spec.name,
        functools.partial(_records, folder, rows, _indices(spec, file, rows, classes), spec=spec),
        classes=classes,
        image_root=str(folder),
        evaluator_type="multi_label" if spec.multi_label else "classification",
    )


def _records(folder: Path, rows: Sequence[Row], indices: Sequence[tuple[int, ...]], *, spec: DatasetSpec) -> Records:
    """One record per image: ``file_name``, ``image_id`` (the path in the list), and ``category_id`` (int), or for
    several labels ``category_ids`` (sorted list of int)."""
    records: Records = []
    for row, found in zip(rows, indices, strict=True):
        label = {"category_ids": sorted(set(found))} if spec.multi_label else {"category_id": found[0]}
        path = row.path
        # In some lists, such as that of Places365, paths below IMAGES begin with a slash.
        if spec.images and path.startswith("/"):
            is_absolute = Path(path).is_relative_to(folder.absolute()) or os.path.isfile(path)
            path = path if is_absolute else path.lstrip("/")
        records.append({"file_name": str(folder / path), "image_id": row.path, **label})
    return records


def _indices(spec: DatasetSpec, file: Path, rows: Sequence[Row], classes: Sequence[str]) -> list[tuple[int, ...]]:
    index_of = LabelIndex(classes)
    problems = Problems(subject(spec))
    found = []
    for row in rows:
        indices = [index_of[label] for label in row.labels]
        for label, index in zip(row.labels, indices, strict=True):
            if index is None:
                wish = index_of.expected(label)
                text = f"{file}, line {row.line}: {row.path} has the label {label!r}, but {wish}"
                problems.add("labels of unknown classes", text + _several(spec, label))
        found.append(tuple(index for index in indices if index is not None))
    raise_if_any(problems)
    return found


def _check_separators(spec: DatasetSpec, file: Path, classes: Sequence[str]) -> None:
    """See that no class, of those that the list itself has, is several labels in a row."""
    problems = Problems(subject(spec))
    for label in classes:
        if spec.multi_label and ("," in label or "|" in label):
            text = f"{file} has the label {label!r}, but several labels are separated by semicolons, or by spaces."
            problems.add("joined labels", f"{text} If it is the name of a class, list all classes in CLASSES.")
        elif not spec.multi_label and ";" in label:
            text = f"{file} has the label {label!r}.{_several(spec, label)}"
            problems.add("joined labels", f"{text} If it is the name of a class, list all classes in CLASSES.")
    raise_if_any(problems)


def _several(spec: DatasetSpec, label: str) -> str:
    return "" if spec.multi_label or ";" not in label else " Set MULTI_LABEL: True if these are several labels."


def _read_rows(spec: DatasetSpec, file: Path) -> list[Row]:
    """The images of the list, in its order.

    Raises:
        ConfigError: with all malformed lines and repeated images.
    """
    text = read_text(spec, "LIST", file)
    cells = [(line, row) for line, row in _split(text) if any(row)]
    if cells and not any(map(_is_image, cells[0][1])):
        header, cells = cells[0][1], cells[1:]
    else:
        header = []
    if not cells:
        raise fail(spec, f"LIST: {file} has no image, but one a line is expected, followed by its label.")
    width = len(header if len(header) > 1 else cells[0][1])  # a lone word above is a title
    path_column, label_column = _find_columns(spec, file, header, cells[0][1])
    separator = None
    if spec.multi_label:  # one for the whole file, as a lone label may be a name with a space
        separator = ";" if any(";" in row[label_column] for _, row in cells if len(row) > label_column) else " "
    problems, seen, rows = Problems(subject(spec)), dict[str, int](), []
    for line, row in cells:
        if any(row[width:]) and not spec.columns:
            expected = f"{width} columns, as in the first line, are expected"
            problems.add("malformed lines", f"{file}, line {line}: got {row}, but {expected}.")
            continue
        if len(row) <= max(path_column, label_column) or not row[path_column]:
            expected = (
                f"a path in column {path_column} and a label in column {label_column}, counted from 0, are expected"
            )
            problems.add("malformed lines", f"{file}, line {line}: got {row}, but {expected}.")
            continue
        path, labels = row[path_column], _split_labels(row[label_column], separator)
        if path in seen:
            problems.add("repeated images", f"{file}, line {line}: {path} is in line {seen[path]} already.")
        if not labels and not spec.multi_label:
            problems.add("images without a label", f"{file}, line {line}: {path} has no label, but one is expected.")
        seen.setdefault(path, line)
        rows.append(Row(line, path, labels))
    raise_if_any(problems)
    return rows


def _split_labels(cell: str, separator: str | None) -> tuple[str, ...]:
    """The labels of a cell: one, unless there is a separator; that may be a space, which stands for any number."""
    if separator is None:
        return (cell,) if cell else ()
    parts = cell.split(separator) if separator.strip() else cell.split()
    return tuple(part.strip() for part in parts if part.strip())


def _split(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line, without spaces around them."""
    lines = text.splitlines()
    # The second line, as the first one may be a header.
    probe = next((line for line in lines[1:2] if line.strip()), lines[0] if lines else "")
    delimiter = next((char for char in _DELIMITERS if char in probe), "")
    if delimiter and not _SPACED.fullmatch(probe.strip()):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            yield reader.line_num, [cell.strip() for cell in row]
        return
    for number, line in enumerate(lines, 1):
        found = _SPACED.fullmatch(line.strip())
        yield number, [found["path"], found["label"].strip()] if found else line.split(maxsplit=1)


def _is_image(cell: str) -> bool:
    """Of any kind that Pillow reads, or a first line with another kind would be taken for names of columns."""
    return PurePath(cell).suffix.lower() in {*IMG_EXTENSIONS, *pillow_suffixes()}


def _find_columns(spec: DatasetSpec, file: Path, header: Sequence[str], first: Sequence[str]) -> tuple[int, int]:
    """Numbers of the columns of the path and of the label, from 0; ``first`` is the first row below the header."""
    width = len(first)
    if spec.columns:
        if len(spec.columns) != 2:
            text = f"COLUMNS is {list(spec.columns)}, but two are expected: that of the path and that of the label."
            raise fail(spec, text)
        path, label = (_find_column(spec, file, header, width, column) for column in spec.columns)
        return path, label
    lower = [name.lower() for name in header]
    known = [next((lower.index(name) for name in names if name in lower), -1) for names in (_PATH_NAMES, _LABEL_NAMES)]
    if min(known) >= 0:
        return known[0], known[1]
    if width == 2:
        return (1, 0) if _is_image(first[1]) and not _is_image(first[0]) else (0, 1)
    what = f"the columns {', '.join(header)}" if header else f"{width} columns and no header"
    text = f"{file} has {what}; give those of the path and of the label as COLUMNS, by name or by number from 0."
    raise fail(spec, text)


def _find_column(spec: DatasetSpec, file: Path, header: Sequence[str], width: int, column: object) -> int:
    if isinstance(column, str) and column in header:
        return list(header).index(column)
    if isinstance(column, int) and not isinstance(column, bool) and 0 <= column < width:
        return column
    known = nearest(str(column), header) if header else f" It has no header and {width} columns, numbered from 0."
    raise fail(spec, f"COLUMNS: {file} has no column {column!r}.{known}")
