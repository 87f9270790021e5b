"""Where the parts of a study run: some at a time, each in a place of its own."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from queue import Queue


class Places:
    """So many places, each with its share of the cores, or with a GPU; who wants one waits until one is free."""

    def __init__(self, number: int):
        self.number = number
        self._is_closed = False
        self._free: Queue[int] = Queue()
        for place in range(number):
            self._free.put(place)

    @contextmanager
    def take(self) -> Iterator[int]:
        """Wait for a place and hold it: its number, from 0, which decides the GPU.

        Raises:
            CancelledError: when :meth:`close` was called, also while waiting.
        """
        place = self._free.get()
        try:
            if self._is_closed:
                raise CancelledError
            yield place
        finally:
            self._free.put(place)

    def close(self) -> None:
        """Let nobody have a place any more; those who have one keep it."""
        self._is_closed = True
