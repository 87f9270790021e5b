"""Files that are whole or not there: written under another name, synced to disk, then renamed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


class SaveError(OSError):
    """A file could not be written; says which and why. What was there before is still there."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give another name to write to, and rename what was written to ``path``.

    ``path`` is at any time, also after a power cut, either absent, the old file, or the whole new one.

    Raises:
        SaveError: when the disk is full, read-only, or fails otherwise.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)  # the new name itself
    except BaseException as error:
        with suppress(OSError):  # what went wrong before says more
            part.unlink(missing_ok=True)
        reason = _os_error(error)
        if reason is None:
            raise
        raise SaveError(f"{path} could not be written: {reason.strerror or reason}.") from error


def save_atomically(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint; see :func:`replacing`."""
    with replacing(path) as part, part.open("wb") as file:
        torch.save(dict(data), file)


def write_atomically(text: str, path: str | Path) -> None:
    """Write a text file; see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def remove_parts(folder: str | Path) -> None:
    """Remove what killed processes left half-written in a folder."""
    for part in Path(folder).glob(".*.part"):
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind another one: torch.save hides it behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause
