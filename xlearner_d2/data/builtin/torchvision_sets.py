"""Public classification sets, read by ``torchvision.datasets`` from the files that it downloads.

Images stay where they are. Those of sets that keep them in a few large files are unpacked to PNG once, into
``xlearner_cache`` below the root, so that they are files for all that comes after. Nothing is downloaded.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from ...specs import ConfigError, DatasetSpec, nearest
from . import wider_face
from .class_splits import Sample, split_by_class
from .common import Records, add_to_catalogs, fail
from .public_sets import Labelled, PublicSet, public_sets
from .torchvision_files import CACHE, check_files, how_to_obtain, make_once, open_dataset, read_json


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``torchvision``. Its files are checked, and its images listed or unpacked, here.

    Raises:
        ConfigError: for an unknown set or split, missing or damaged files, or an incomplete set.
    """
    folder = root / spec.root
    if spec.dataset == wider_face.NAME:
        wider_face.register(spec, folder)
        return
    sets = public_sets()
    if spec.dataset not in sets:
        raise fail(spec, f"DATASET is {spec.dataset!r}.{nearest(spec.dataset, [*sets, wider_face.NAME])}")
    public = sets[spec.dataset]
    splits = _splits(spec, public)
    check_files(spec, folder, [public.parts[split] for split in splits if not _cache(spec, folder, split).is_dir()])
    found = [_list_split(spec, public, folder, split) for split in splits]
    classes, samples = found[0].classes, [sample for part in found for sample in part.samples]
    problem = _incomplete(public, classes, samples)
    if problem:
        raise fail(spec, f"{folder}: {problem} {_again(spec, public, folder, splits[0])}")
    add_to_catalogs(
        spec.name,
        functools.partial(_read, folder, samples),
        classes=classes,
        image_root=str(folder),
        evaluator_type="classification",
    )


def _read(folder: Path, samples: Sequence[Sample]) -> Records:
    """One record per image, as of an image folder; ``image_id`` is the path below the root."""
    return [{"file_name": str(folder / path), "image_id": path, "category_id": label} for path, label in samples]


def _splits(spec: DatasetSpec, public: PublicSet) -> list[str]:
    """The splits that ``SPLIT`` joins by ``+``."""
    splits = spec.split.split("+")
    for split in splits:
        if split not in public.parts:
            known = f"{', '.join(public.parts)}, or several joined by +, is expected."
            raise _wrong_split(spec, known + nearest(split, public.parts))
    if len(set(splits)) < len(splits):
        raise _wrong_split(spec, "each part once is expected.")
    return splits


def _wrong_split(spec: DatasetSpec, text: str) -> ConfigError:
    return fail(spec, f"SPLIT is {spec.split!r}, but {text}")


def _cache(spec: DatasetSpec, folder: Path, split: str) -> Path:
    return folder / CACHE / spec.dataset / split


def _again(spec: DatasetSpec, public: PublicSet, folder: Path, split: str) -> str:
    return f"Is it complete? If not, remove it first. {how_to_obtain(spec, folder, public.parts[split])}"


def _list_split(spec: DatasetSpec, public: PublicSet, folder: Path, split: str) -> Labelled:
    """Class names and images of one split, with paths below ``folder``."""
    if public.list_images is None:
        return _list_unpacked(spec, public, folder, split)
    classes, found = public.list_images(open_dataset(spec, folder, public.parts[split], **public.options))
    samples = [(Path(path).relative_to(folder).as_posix(), int(label)) for path, label in found]
    if public.rule is not None:
        try:
            samples = split_by_class(samples, public.rule, split=split)
        except ValueError as error:
            raise fail(spec, f"{folder}: {error}. {_again(spec, public, folder, split)}") from error
    return Labelled([str(name) for name in classes or public.classes], samples)


def _list_unpacked(spec: DatasetSpec, public: PublicSet, folder: Path, split: str) -> Labelled:
    """The same of a set that torchvision holds as arrays, which are unpacked unless they were before."""

    def make(target: Path) -> None:
        dataset = open_dataset(spec, folder, public.parts[split])
        _unpack(dataset, public.classes or dataset.classes, target, title=f"Unpacking {spec.dataset} {split}")

    cache = make_once(spec, _cache(spec, folder, split), make)
    index = read_json(spec, cache / "index.json")
    below, classes = cache.relative_to(folder), index["classes"]
    samples = []
    for number, label in enumerate(index["labels"]):
        samples.append(((below / _file(number, classes[label])).as_posix(), label))
    return Labelled(classes, samples)


def _unpack(dataset: Any, classes: Sequence[str], folder: Path, *, title: str) -> None:
    """Write the images of a data set as PNG, in a folder per class, and ``index.json``: the classes, and the labels."""
    for name in classes:
        (folder / name).mkdir()
    labels: list[int] = []
    hidden = True if os.environ.get("CI") else None  # None: hidden unless on a terminal
    for number in tqdm(range(len(dataset)), desc=title, delay=5, disable=hidden, leave=False):
        image, label = dataset[number]
        image.save(folder / _file(number, classes[label]), compress_level=1)
        labels.append(int(label))
    (folder / "index.json").write_text(json.dumps({"classes": list(classes), "labels": labels}), encoding="utf-8")


def _file(number: int, name: str) -> str:
    return f"{name}/{number:06d}.png"


def _incomplete(public: PublicSet, classes: Sequence[str], samples: Sequence[Sample]) -> str:
    """What is missing, or an empty string. A lost folder would shift the indices of all classes after it."""
    if len(classes) != public.num_classes:
        return f"there are {len(classes)} classes, but {public.num_classes} are expected."
    counts = Counter(label for _, label in samples)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        return f"{len(empty)} of {len(classes)} classes have no image: {shown}."
    return ""
