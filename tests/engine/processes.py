"""Forked processes for tests: quick to start, as everything is imported, and each with its own file of messages."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Seconds that nothing here should take, however busy the machine is.
LONG = 120


class Processes:
    """``run(rank)`` in ``count`` forked processes.

    Attributes:
        folder: where process ``rank`` writes its standard error, into ``<rank>.txt``.
    """

    def __init__(self, run: Callable[[int], Any], count: int, folder: Path):
        fork = multiprocessing.get_context("fork")
        self.folder = folder
        self.all = [fork.Process(target=self._main, args=(run, rank)) for rank in range(count)]
        for process in self.all:
            process.start()

    def _main(self, run: Callable[[int], Any], rank: int) -> None:
        file = os.open(self.folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(file, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        run(rank)

    def wait(self, *ranks: int) -> list[int | None]:
        """Exit codes of these, else of all; those that do not end are killed, and give None."""
        waited = [self.all[rank] for rank in ranks] or self.all
        for process in waited:
            process.join(LONG)
        codes = [process.exitcode for process in waited]
        for process in self.all:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        return codes

    def errors(self) -> str:
        """Standard error of all, by rank."""
        return "".join((self.folder / f"{rank}.txt").read_text() for rank in range(len(self.all)))
