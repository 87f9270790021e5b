"""Semantic segmentation: a folder of images and one of label PNGs with the same names.

The records equal those of Detectron2's ``load_sem_seg``, which is not used because it takes images of one suffix alone
and pairs images and labels by position, so that equally many of either with different names are mixed up.
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from torchvision.datasets.folder import IMG_EXTENSIONS

from ...specs import DatasetSpec
from ..problems import Problems
from .common import (
    Records,
    add_to_catalogs,
    fail,
    find_folder,
    list_images,
    raise_if_any,
    read_classes,
    read_text,
    subject,
)

logger = logging.getLogger(__name__)


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``sem_seg``.

    Raises:
        ConfigError: for a missing folder, or a wrong list of classes or images, or a wrong ignored value.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    labels = find_folder(spec, "LABELS", root / spec.labels)
    classes = read_classes(spec, root)
    if not classes:
        raise fail(spec, "CLASSES is empty, but the names of the label values 0, 1, … are expected.")
    if not 0 <= spec.ignore_value <= 255:
        raise fail(spec, f"IGNORE_VALUE is {spec.ignore_value}, but a label value from 0 to 255 is expected.")
    names = _read_list(spec, root / spec.list) if spec.list else None
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, images, labels, names),
        stuff_classes=classes,
        ignore_label=spec.ignore_value,
        image_root=str(images),
        sem_seg_root=str(labels),
        evaluator_type="sem_seg",
    )


def _read_list(spec: DatasetSpec, path: Path) -> list[str]:
    """Names of images, without folder and suffix, from a file with one a line.

    A line may also give the label after the image, as the lists of some projects do; the two then share one name.
    """
    problems = Problems(subject(spec))
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(spec, "LIST", path).splitlines(), 1):
        found = {_name(word) for word in line.split()}
        if len(found) > 1:
            text = f"{path}, line {number}: got {line.strip()!r}, but one image, or it and its label, is expected."
            problems.add("malformed lines", text)
        for name in found & names.keys():
            problems.add("repeated images", f"{path}, line {number}: {name!r} is in line {names[name]} already.")
        names |= dict.fromkeys(found, number)
    raise_if_any(problems)
    if not names:
        raise fail(spec, f"LIST: {path} is empty, but one image name a line is expected.")
    return list(names)


def _name(word: str) -> str:
    path = PurePosixPath(word)
    return path.stem if path.suffix.lower() in IMG_EXTENSIONS else path.name


def _read(spec: DatasetSpec, image_folder: Path, label_folder: Path, listed: Sequence[str] | None) -> Records:
    """Detectron2 records of the images that are ``listed``, or else of all that have a label.

    Without a list, an image without a label is left out with a warning, as Detectron2 does, because only a part of a
    data set may be labelled. A label without an image can only be a mistake.

    Raises:
        ConfigError: if there are no pairs, labels without an image, or listed images or labels are not there.
    """
    try:
        images, labels = list_images(image_folder), list_images(label_folder)
    except ValueError as error:
        raise fail(spec, str(error)) from error
    labels = {name: path for name, path in labels.items() if path.suffix.lower() == ".png"}
    for folder, kind, found in ((image_folder, "image", images), (label_folder, "label PNG", labels)):
        if not found:
            raise fail(spec, f"{folder} holds no {kind}, but files directly below it are expected.")
        _check_listed(spec, folder, kind, found, listed or ())
    if listed is None:
        _check_labels(spec, image_folder, images, labels)
        _warn_unlabelled(spec, sorted(images.keys() - labels.keys()), len(images), label_folder)
    names = labels if listed is None else listed
    return [{"file_name": str(images[name]), "sem_seg_file_name": str(labels[name])} for name in names]


def _check_listed(spec: DatasetSpec, folder: Path, kind: str, found: Mapping[str, Path], names: Iterable[str]) -> None:
    problems = Problems(subject(spec))
    for name in names:
        if name not in found:
            text = f"LIST has {name!r}, but {folder} has no {kind} of that name."
            problems.add(f"listed names without {kind}", text)
    raise_if_any(problems)


def _check_labels(spec: DatasetSpec, folder: Path, images: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    problems = Problems(subject(spec))
    for name in sorted(labels.keys() - images.keys()):
        text = f"{labels[name]} has no image, but one named {name} is expected in {folder}."
        problems.add("labels without an image", text)
    raise_if_any(problems)


def _warn_unlabelled(spec: DatasetSpec, names: list[str], num_images: int, folder: Path) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        text = "%s: %d of %d images have no label in %s and are left out: %s"
        logger.warning(text, subject(spec), len(names), num_images, folder, shown)
