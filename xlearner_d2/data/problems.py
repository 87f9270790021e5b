"""What is wrong with some data: collected instead of raised one by one, and shortened where it repeats."""

from collections import defaultdict


class Problems:
    """Problems of one data set, grouped by kind.

    Args:
        subject: what they are about; starts every line.
        limit: how many of one kind are given in full.
    """

    def __init__(self, subject: str, *, limit: int = 5):
        self.subject = subject
        self.limit = limit
        self._by_kind: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, text: str) -> None:
        """Add one problem; ``kind`` is a plural that can follow "and 37 more", such as "missing images"."""
        self._by_kind[kind].append(text)

    def __bool__(self) -> bool:
        return bool(self._by_kind)

    def count(self, kind: str) -> int:
        """How many problems of a kind were added."""
        return len(self._by_kind.get(kind, ()))

    def pop(self, kind: str) -> list[str]:
        """Remove and return the problems of a kind."""
        return self._by_kind.pop(kind, [])

    def lines(self) -> list[str]:
        """One line per problem, and one per kind of which some were left out."""
        lines = []
        for kind, texts in self._by_kind.items():
            lines += [f"{self.subject}: {text}" for text in texts[: self.limit]]
            if len(texts) > self.limit:
                lines.append(f"{self.subject}: … and {len(texts) - self.limit} more {kind}.")
        return lines
