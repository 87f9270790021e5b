"""Labels as a list of images gives them, names or numbers, and the class indices that they stand for."""

from collections.abc import Iterable, Mapping, Sequence
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


def label_indices(classes: Sequence[str]) -> dict[str, int]:
    """Class index by label: the names of classes and, where no name is a number that would be another one, indices."""
    by_name = {name: index for index, name in enumerate(classes)}
    if any(name.isdecimal() and int(name) != index for name, index in by_name.items()):
        return by_name
    return {**{str(index): index for index in range(len(classes))}, **by_name}


def unknown_label(label: str, classes: Sequence[str], known: Mapping[str, int]) -> str:
    """In words: what was expected instead of a label; ``known`` as of :func:`label_indices`."""
    count = len(classes)
    number = f", or a number from 0 to {count - 1}," if len(known) > count else ""
    return f"one of the {count} classes{number} is expected.{nearest(label, classes)}"
