"""Labels as a list of images gives them, names or numbers, and the class indices that they stand for."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ...specs import DatasetSpec, nearest
from .common import check_similar, read_classes


def find_classes(spec: DatasetSpec, root: Path, labels: Iterable[str]) -> list[str]:
    """``CLASSES``, or else all different labels: by their value if all are whole numbers, else by alphabet.

    Raises:
        ConfigError: see :func:`read_classes` and :func:`check_similar`.
    """
    if given := read_classes(spec, root):
        return given
    found = set(labels)
    check_similar(spec, found)
    numbers = all(label.isdecimal() for label in found)
    return sorted(found, key=lambda label: (int(label) if numbers else 0, label))


def class_index(label: str, classes: Mapping[str, int]) -> int | None:
    """Index of a label that is the name of a class or, where no name is a number, its index; None for any other."""
    if label in classes:
        return classes[label]
    return int(label) if label.isdecimal() and int(label) < len(classes) and not _are_numbered(classes) else None


def unknown_label(label: str, classes: Mapping[str, int]) -> str:
    """In words: what was expected instead of a label."""
    count = len(classes)
    number = "" if _are_numbered(classes) else f", or a number from 0 to {count - 1},"
    return f"one of the {count} classes{number} is expected.{nearest(label, classes)}"


def _are_numbered(classes: Mapping[str, int]) -> bool:
    """Whether a number may be the name of a class."""
    return any(name.isdecimal() for name in classes)
