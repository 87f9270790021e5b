"""Semantic segmentation: a folder of images and one of label PNGs with the same names.

The records equal those of Detectron2's ``load_sem_seg``, which is not used because it takes images of one suffix alone
and pairs images and labels by position, so that equally many of either with different names are mixed up.
"""

import functools
import logging
from pathlib import Path

from ...specs import DatasetSpec
from ..problems import Problems
from .common import Records, add_to_catalogs, fail, find_folder, list_images, raise_if_any, read_classes, subject

logger = logging.getLogger(__name__)


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``sem_seg``.

    Raises:
        ConfigError: for a missing folder, or a wrong list of classes or ignored value.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    labels = find_folder(spec, "LABELS", root / spec.labels)
    classes = read_classes(spec, root)
    if not classes:
        raise fail(spec, "CLASSES is empty, but the names of the label values 0, 1, … are expected.")
    if not 0 <= spec.ignore_value <= 255:
        raise fail(spec, f"IGNORE_VALUE is {spec.ignore_value}, but a label value from 0 to 255 is expected.")
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, images, labels),
        stuff_classes=classes,
        ignore_label=spec.ignore_value,
        image_root=str(images),
        sem_seg_root=str(labels),
        evaluator_type="sem_seg",
    )


def _read(spec: DatasetSpec, image_folder: Path, label_folder: Path) -> Records:
    """Detectron2 records of the images that have a label.

    An image without a label is left out with a warning, as Detectron2 does, because only a part of a data set may be
    labelled. A label without an image can only be a mistake.

    Raises:
        ConfigError: if there are no pairs, or labels without an image.
    """
    try:
        images, labels = list_images(image_folder), list_images(label_folder)
    except ValueError as error:
        raise fail(spec, str(error)) from error
    labels = {name: path for name, path in labels.items() if path.suffix.lower() == ".png"}
    for folder, found, kind in ((image_folder, images, "image"), (label_folder, labels, "label PNG")):
        if not found:
            raise fail(spec, f"{folder} holds no {kind}, but files directly below it are expected.")
    problems = Problems(subject(spec))
    for name in sorted(labels.keys() - images.keys()):
        text = f"{labels[name]} has no image, but one named {name} is expected in {image_folder}."
        problems.add("labels without an image", text)
    raise_if_any(problems)
    _warn_unlabelled(spec, sorted(images.keys() - labels.keys()), len(images), label_folder)
    return [{"file_name": str(images[name]), "sem_seg_file_name": str(labels[name])} for name in labels]


def _warn_unlabelled(spec: DatasetSpec, names: list[str], num_images: int, folder: Path) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        text = "%s: %d of %d images have no label in %s and are left out: %s"
        logger.warning(text, subject(spec), len(names), num_images, folder, shown)
