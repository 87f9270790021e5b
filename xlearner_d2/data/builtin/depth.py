"""Depth: a folder of images and one of depth maps with the same names, as 16-bit PNG or ``.npy``."""

import functools
import math
from pathlib import Path

from ...specs import DatasetSpec
from ..problems import Problems
from .common import Records, add_to_catalogs, fail, find_folder, list_images, raise_if_any, subject, warn_unlabelled

_SUFFIXES = (".png", ".npy")


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``depth``.

    Raises:
        ConfigError: for a missing folder or a wrong scale.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    labels = find_folder(spec, "LABELS", root / spec.labels)
    if not 0 < spec.scale < math.inf:
        raise fail(spec, f"SCALE is {spec.scale}, but what a metre is in the files is expected, such as 1000.")
    add_to_catalogs(
        spec.name, functools.partial(_read, spec, images, labels), image_root=str(images), evaluator_type="depth"
    )


def _read(spec: DatasetSpec, image_folder: Path, label_folder: Path) -> Records:
    """Records of the images that have a depth map.

    Raises:
        ConfigError: if there are none, or depth maps without an image, or two of one name.
    """
    try:
        images = list_images(image_folder)
    except ValueError as error:
        raise fail(spec, str(error)) from error
    problems = Problems(subject(spec))
    labels: dict[str, Path] = {}
    for path in sorted(label_folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in labels:
            problems.add("repeated depth maps", f"{path} and {labels[path.stem].name} are of one image.")
        elif path.stem not in images:
            text = f"{path} has no image, but one named {path.stem} is expected in {image_folder}."
            problems.add("depth maps without an image", text)
        labels[path.stem] = path
    raise_if_any(problems)
    if not labels:
        raise fail(spec, f"{label_folder} holds no depth map, but .png or .npy files directly below it are expected.")
    warn_unlabelled(spec, sorted(images.keys() - labels.keys()), len(images), label_folder)
    return [
        {"file_name": str(images[name]), "depth_file_name": str(path), "depth_scale": spec.scale}
        for name, path in labels.items()
    ]
