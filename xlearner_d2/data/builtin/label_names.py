"""Labels as a list of images gives them, names or numbers, and the class indices that they stand for."""

import functools
from collections.abc import Iterable, Sequence
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


class LabelIndex:
    """Which class a label is of: one of that name or, where no class is called by a number that is not its own, index.

    Args:
        classes: names, in order of their index.
    """

    def __init__(self, classes: Sequence[str]):
        self.by_name = {name: index for index, name in enumerate(classes)}
        self.expected = functools.cache(self._expected)  # a whole list of wrong labels has few that differ
        self.takes_numbers = all(int(name) == index for name, index in self.by_name.items() if name.isdecimal())

    def __getitem__(self, label: str) -> int | None:
        """The index of the class; None for any other label."""
        found = self.by_name.get(label)
        if found is None and self.takes_numbers and label.isdecimal() and int(label) < len(self.by_name):
            return int(label)
        return found

    def _expected(self, label: str) -> str:
        """In words: what was expected instead of a label."""
        count = len(self.by_name)
        number = f", or a number from 0 to {count - 1}," if self.takes_numbers else ""
        return f"one of the {count} classes{number} is expected.{nearest(label, self.by_name)}"
