"""Image classification: one folder of images per class, read by torchvision."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import log_first_n
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ...specs import DatasetSpec, nearest
from ..problems import Problems
from .common import Records, add_to_catalogs, fail, find_folder, pillow_suffixes, raise_if_any, read_classes, subject

logger = logging.getLogger(__name__)

_KNOWN = ", ".join(IMG_EXTENSIONS)
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``image_folder``.

    The classes are ``CLASSES``, or else the names of the folders, sorted.

    Raises:
        ConfigError: for a missing folder, one that holds no folders, or one that is not in ``CLASSES``.
    """
    folder = find_folder(spec, "IMAGES", root / spec.images)
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise fail(spec, f"IMAGES: {folder} holds no folder, but one folder per class is expected.")
    given = read_classes(spec, root)
    if not given and set(found) <= _SPLITS:
        text = f"IMAGES: {folder} holds {', '.join(found)}, but one folder per class is expected, not per split."
        raise fail(spec, f"{text} Name one of them; or, if they are classes, list them in CLASSES.")
    problems = Problems(subject(spec))
    classes = given or found
    for name in found:
        if name not in classes:
            text = f"{folder / name} is no class: {name!r} is not in CLASSES.{nearest(name, classes)}"
            problems.add("folders that are no class", text)
    raise_if_any(problems)
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, folder, classes),
        classes=classes,
        image_root=str(folder),
        evaluator_type="classification",
    )


def _read(spec: DatasetSpec, folder: Path, classes: Sequence[str]) -> Records:
    """One record per image: ``file_name``, ``image_id`` (the path below the folder) and ``category_id``.

    Raises:
        ConfigError: without any image, or for a class without one unless ``CLASSES`` declares that it exists.
    """
    indices = {name: index for index, name in enumerate(classes)}
    others: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        if _is_image(path):
            return True
        others[Path(path).suffix.lower()] += not os.path.basename(path).startswith(".")
        return False

    samples = make_dataset(str(folder), indices, is_valid_file=is_image, allow_empty=True)
    if unread := {end: number for end, number in others.items() if number and end in pillow_suffixes()}:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        text = f"{subject(spec)}: files of other suffixes are not read: {listed}. Known: {_KNOWN}"
        log_first_n(logging.WARNING, text, key="message")  # a study reads the same data for each of its runs
    if not samples:
        raise fail(spec, f"{folder} holds no image; known suffixes: {_KNOWN}.")
    counts = Counter(index for _, index in samples)
    empty = [name for name, index in indices.items() if not counts[index]]
    if empty and not spec.classes:
        problems = Problems(subject(spec))
        for name in empty:
            text = f"{folder / name} holds no image; remove it, or list all classes in CLASSES to allow empty ones."
            problems.add("empty classes", text)
        raise_if_any(problems)
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        logger.warning("%s: %d of %d classes have no image: %s", subject(spec), len(empty), len(classes), shown)
    return [
        {"file_name": path, "image_id": Path(path).relative_to(folder).as_posix(), "category_id": index}
        for path, index in samples
    ]


def _is_image(path: str) -> bool:
    """Not those that macOS leaves beside a copy, ._1.jpg."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
