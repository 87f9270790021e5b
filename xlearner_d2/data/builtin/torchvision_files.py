"""The files that classes of ``torchvision.datasets`` read: are they there and whole, and what is made of them once."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchvision.datasets
from iopath.common.file_io import file_lock
from torchvision.datasets.utils import calculate_md5

from ...specs import DatasetSpec
from ..problems import Problems
from .common import fail, hint, raise_if_any, subject

#: Folder below the root for what is made once and then read again.
CACHE = "xlearner_cache"
_SHOWN = 4
_NOTES = {
    "StanfordCars": "torchvision can download this set no more, as its site is gone: unpack a copy of its archives.",
    "WIDERFace": "The download needs the package gdown.",
    "PCAM": "The download needs the package gdown, and reading it h5py.",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What torchvision reads for one split.

    Attributes:
        needs: files and folders, as paths below the root.
        options: arguments of the class besides its root.
        checksums: MD5 by path, where torchvision knows it.
    """

    needs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)


def check_files(spec: DatasetSpec, root: Path, parts: Iterable[Part]) -> None:
    """See that all files exist and are undamaged, before torchvision opens any.

    Args:
        spec: the data set's record.
        root: the folder that torchvision takes as its root.
        parts: of all splits that are asked for.

    Raises:
        ConfigError: naming what is missing or damaged, and the command that downloads it.
    """
    needs = {path: part for part in parts for path in part.needs}
    missing = [path for path in needs if not (root / path).exists()]
    problems = Problems(subject(spec))
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        how = how_to_obtain(spec, root, *(needs[path] for path in missing))
        problems.add("missing files", f"there is no {shown} below ROOT {root}. {hint(root / missing[0])} {how}")
    for path, part in needs.items():
        expected = part.checksums.get(path)
        if expected and path not in missing and (got := calculate_md5(root / path)) != expected:
            text = f"{root / path} is damaged: its MD5 is {got}, but {expected} is expected. Remove it first."
            problems.add("damaged files", f"{text} {how_to_obtain(spec, root, part)}")
    raise_if_any(problems)


def how_to_obtain(spec: DatasetSpec, root: Path, *parts: Part) -> str:
    """In words: the command that downloads a set, once for each split that is downloaded by itself."""
    note = _NOTES.get(spec.dataset, "")
    if spec.dataset == "StanfordCars":
        return note
    calls = {_call(spec, root, part) for part in parts}
    code = "; ".join(["from torchvision import datasets", *sorted(calls)])
    return f"To download it: python -c {shlex.quote(code)} {note}".rstrip()


def _call(spec: DatasetSpec, root: Path, part: Part) -> str:
    arguments = [json.dumps(str(root))]
    if spec.dataset in ("SVHN", "GTSRB", "PCAM"):  # all others download every split at once
        arguments.append(f"split={json.dumps(part.options['split'])}")
    return f"datasets.{spec.dataset}({', '.join(arguments)}, download=True)"


def open_dataset(spec: DatasetSpec, root: Path, part: Part, **options: Any) -> Any:
    """The torchvision data set of a split, whose files were checked; nothing is downloaded.

    Raises:
        ConfigError: whatever it is that torchvision or its readers of .mat and other files complain about.
    """
    try:
        return getattr(torchvision.datasets, spec.dataset)(root, **part.options, **options, download=False)
    except Exception as error:  # each reader has errors of its own
        text = f"torchvision.datasets.{spec.dataset} cannot read {root}; some of its files are damaged: {error!r}."
        raise fail(spec, f"{text} {how_to_obtain(spec, root, part)}") from error


def make_once(spec: DatasetSpec, folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, after filling it if it does not exist.

    It appears complete or not at all; of several processes, one makes it and the others wait.

    Args:
        spec: the data set's record, for messages.
        folder: to be made.
        make: writes the content into the empty folder it is given.

    Raises:
        ConfigError: if it cannot be written, or by ``make``.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    try:
        with file_lock(str(folder)):
            if not folder.is_dir():  # no other process made it meanwhile
                shutil.rmtree(part, ignore_errors=True)  # left by a process that was stopped
                part.mkdir(parents=True)
                make(part)
                part.rename(folder)
    except OSError as error:
        text = f"{folder}, which is written once and then read, cannot be made: {error}."
        raise fail(spec, text) from error
    return folder


def read_json(spec: DatasetSpec, file: Path) -> Any:
    """What :func:`make_once` left in a json file.

    Raises:
        ConfigError: if it is damaged, naming the folder to remove.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(spec, f"{file} is damaged: {error}. Remove {file.parent}; it is then made again.") from error
