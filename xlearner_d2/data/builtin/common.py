"""What the readers of all formats share: paths, lists of class names, and the entry in Detectron2's catalogs."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...specs import ConfigError, DatasetSpec
from ..problems import Problems

Records = list[dict[str, Any]]


def subject(spec: DatasetSpec) -> str:
    """How messages name a data set."""
    return f"data set {spec.name!r}"


def raise_if_any(problems: Problems) -> None:
    """Raise what was collected as one :class:`ConfigError`."""
    if problems:
        raise ConfigError(problems.lines(), what="The data")


def fail(spec: DatasetSpec, text: str) -> ConfigError:
    """The error for a single problem of a data set."""
    return ConfigError([f"{subject(spec)}: {text}"], what="The data")


def warn_unlabelled(spec: DatasetSpec, names: list[str], num_images: int, folder: Path) -> None:
    """Say which images are left out; names of them, of so many, whose labels were looked for in a folder."""
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        count = f"{len(names)} of {num_images} images"
        text = f"{subject(spec)}: {count} have no label in {folder} and are left out: {shown}"
        log_first_n(logging.WARNING, text, key="message")  # a study reads the same data for each of its runs


def find_folder(spec: DatasetSpec, key: str, path: Path) -> Path:
    """Return ``path`` if it is a folder.

    Raises:
        ConfigError: naming the setting ``key`` otherwise.
    """
    if path.is_dir():
        return path
    got = "a file" if path.exists() else "nothing"
    raise fail(spec, f"{key}: {path} is {got}, but a folder is expected. {hint(path)}")


def hint(path: Path) -> str:
    """Where the search for a missing path went wrong: its deepest folder that exists."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return f"Of this path, {existing} exists; relative paths start at $DETECTRON2_DATASETS."


def read_text(spec: DatasetSpec, key: str, path: Path) -> str:
    """The content of a text file.

    Raises:
        ConfigError: naming the setting ``key`` and the file, if it is missing or not UTF-8.
    """
    if not path.is_file():
        raise fail(spec, f"{key}: there is no file {path}. {hint(path)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(spec, f"{key}: {path} cannot be read as UTF-8 text: {error}.") from error


def list_images(folder: Path) -> dict[str, Path]:
    """Images directly below ``folder`` by their name without suffix, sorted.

    Raises:
        ValueError: if two images differ in their suffix alone.
    """
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMG_EXTENSIONS or path.name.startswith("."):
            continue
        if path.stem in images:
            raise ValueError(f"{path} and {images[path.stem].name} differ in their suffix alone, but one is expected.")
        images[path.stem] = path
    return images


def pillow_suffixes() -> set[str]:
    """Of all files that Pillow reads, whether images of a data set or not."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def walk_images(folder: Path, suffixes: Sequence[str] = IMG_EXTENSIONS) -> list[str]:
    """Paths below ``folder`` of images in it and in folders below it, however deep, sorted, without hidden ones."""
    found: list[str] = []
    start = len(str(folder)) + 1
    for parent, folders, names in os.walk(str(folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Strings, as a path object for each of a million files takes its time.
        below = f"{parent[start:]}/" if len(parent) > start else ""
        found += [below + name for name in names if name.lower().endswith(tuple(suffixes)) and name[0] != "."]
    return sorted(found)


def read_classes(spec: DatasetSpec, root: Path, *, default: Path | None = None) -> list[str] | None:
    """Class names in order of their index: ``CLASSES``, or a file with one name a line, or the file ``default``.

    Returns:
        the names, or None if ``CLASSES`` is not given and ``default`` is not there.

    Raises:
        ConfigError: for a missing or unreadable file, no name, an empty one, or one given twice.
    """
    where = "CLASSES"
    if isinstance(spec.classes, str) or (not spec.classes and default is not None and default.is_file()):
        path = root / spec.classes if isinstance(spec.classes, str) else default
        assert path is not None
        where = f"CLASSES: {path}" if isinstance(spec.classes, str) else str(path)
        names = [line.strip() for line in read_text(spec, "CLASSES", path).rstrip().split("\n")]
    elif spec.classes:
        names = list(spec.classes)
    else:
        return None
    _check_names(spec, where, names)
    return names


def _check_names(spec: DatasetSpec, where: str, names: list[str]) -> None:
    if not any(names):
        raise fail(spec, f"{where} is empty, but one class name a line is expected.")
    problems = Problems(subject(spec))
    for number, name in enumerate(names, 1):
        if not name:
            text = f"{where}: name {number} of {len(names)} is empty, but a class name is expected."
            problems.add("empty names", text)
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            problems.add("repeated names", f"{where} has {name!r} {count} times, but each class once is expected.")
    raise_if_any(problems)


def check_similar(spec: DatasetSpec, names: Iterable[str]) -> None:
    """See that no two of the class names that were found in annotations are probably meant to be one.

    Raises:
        ConfigError: naming those that differ in capitals, spaces or leading zeros alone.
    """
    problems = Problems(subject(spec))
    seen: dict[str, str] = {}
    for name in sorted(names):
        plain = "".join(name.split()).casefold()
        other = seen.setdefault(plain.lstrip("0") if plain.isdecimal() else plain, name)
        if other != name:
            text = f"the labels {other!r} and {name!r} differ in capitals, spaces or leading zeros alone."
            problems.add("similar labels", f"{text} Correct them; or, if both are meant, list all classes in CLASSES.")
    raise_if_any(problems)


def add_to_catalogs(name: str, reader: Callable[[], Records], **metadata: Any) -> None:
    """Register a data set with Detectron2, replacing one of this name (see :func:`..register_datasets`)."""
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, reader)
    MetadataCatalog.get(name).set(**metadata)
