"""How a run ends before its end: a signal asks for it, or it cannot go on."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm

from ..checkpoint.files import SaveError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Seconds within which a signal is the same one again: a terminal sends it to all processes, and so does the launcher.
_SAME = 1.0


class RunStopped(SystemExit):
    """The end of a run that the user should read about in one sentence, not in a traceback.

    Args:
        message: what happened, and what to do; empty on workers that leave it to another one to say so.
        code: exit code of the process.
        agreed: whether all workers stop here, so that none of them has to be told.
    """

    def __init__(self, message: str, *, code: int = 1, agreed: bool = False):
        super().__init__(code)
        self.message = message
        self.agreed = agreed

    def __str__(self) -> str:
        return self.message


def exit_code(number: int) -> int:
    """What shells and schedulers expect of a process that a signal ended."""
    return 128 + number


class StopSignals:
    """Notes SIGINT and SIGTERM while a stage trains, so that the step can be finished and saved.

    A second signal, more than a second later, ends the process at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Start to listen; only the main thread of a process can."""
        self._process = os.getpid()
        # Of its own, so that it does not meet the gradients' traffic.
        self._group: Any = torch.distributed.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Stop to listen."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked process of the data loader: it is needed until the step is finished
        if self.number and time.monotonic() - self._time > _SAME:
            raise RunStopped(f"Stopped by a second {name_of(number)}, without saving.", code=exit_code(number))
        if not self.number:
            self.number, self._time = number, time.monotonic()
            if comm.is_main_process():  # not through a log, which the signal may have interrupted
                os.write(
                    2, f"{name_of(number)}: stopping after this step; once more to stop without saving.\n".encode()
                )

    def agreed(self) -> int:
        """The signal that any worker got, alike on all workers; 0 if none. To be called by all, after each step."""
        if self._group is None:
            return self.number
        number = torch.tensor(self.number)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number)


def name_of(number: int) -> str:
    """SIGTERM, for 15."""
    return signal.Signals(number).name


@contextmanager
def stopping_when_full() -> Iterator[None]:
    """End the run with a sentence when a file cannot be written, or the disk is full.

    Raises:
        RunStopped: instead of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SaveError):
            problem = str(error)
        elif error.errno in _FULL:
            file = error.filename or "A file of the run"
            problem = f"{file} could not be written: {error.strerror}."
        else:
            raise
        raise RunStopped(f"{problem} {MAKE_ROOM}") from error


MAKE_ROOM = "Make room, then add --resume to go on from the last checkpoint."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End the process with a sentence when SIGINT or SIGTERM comes while nothing is trained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process:
            message = f"Stopped by {name_of(number)}. Add --resume to go on from the last checkpoint."
            raise RunStopped(message if comm.is_main_process() else "", code=exit_code(number))

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def passing_on_signals() -> Iterator[None]:
    """In the process that started the workers: hand SIGINT and SIGTERM on to them, and wait for them to stop."""

    def hand_on(number: int, _frame: FrameType | None) -> None:
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                os.kill(worker.pid, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
