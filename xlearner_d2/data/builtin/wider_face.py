"""WIDER FACE: boxes of one class, in the layout of ``torchvision.datasets.WIDERFace``, kept as COCO json.

torchvision's own reader is not used: it gives the column of invalid faces the name "occlusion", and asks for the images
of all splits, whichever it reads.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...specs import DatasetSpec, nearest
from ..problems import Problems
from . import coco
from .common import fail, raise_if_any, read_text, subject
from .torchvision_files import CACHE, Part, check_files, make_once

logger = logging.getLogger(__name__)

NAME = "WIDERFace"
_SPLITS = ("train", "val")
_JSON = "faces.json"
#: Of a row: x, y, width, height, blur, expression, illumination, invalid, occlusion, pose.
_COLUMNS, _INVALID = 10, 7


def register(spec: DatasetSpec, folder: Path) -> None:
    """Register a split; its json is written once, into ``xlearner_cache`` below ``folder``, torchvision's root.

    Raises:
        ConfigError: for an unknown split, or missing or damaged files.
    """
    if spec.split not in _SPLITS:
        text = f"SPLIT is {spec.split!r}, but one with boxes is expected: {', '.join(_SPLITS)}."
        raise fail(spec, text + nearest(spec.split, _SPLITS))
    images = folder / f"widerface/WIDER_{spec.split}/images"
    table = folder / f"widerface/wider_face_split/wider_face_{spec.split}_bbx_gt.txt"
    cache = folder / CACHE / NAME / spec.split
    if not cache.is_dir():
        needs = tuple(path.relative_to(folder).as_posix() for path in (table, images))
        check_files(spec, folder, [Part(needs=needs)])
    make_once(spec, cache, lambda target: _write(spec, table, images, target / _JSON))
    json_spec = replace(spec, format="coco", images=str(images), annotations=str(cache / _JSON))
    coco.register(json_spec, Path())


def _write(spec: DatasetSpec, table: Path, images: Path, file: Path) -> None:
    """Convert the ``table`` of a split; sizes are read from the ``images``."""
    rows = list(_parse(spec, table))
    _check_images(spec, images, [name for name, _ in rows])
    found: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, faces) in enumerate(rows, 1):
        with Image.open(images / name) as image:
            width, height = image.size
        found.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for item in _boxes(faces, width, height):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, **item})
    total = sum(len(faces) for _, faces in rows)
    logger.info("%s: %d of %d boxes are empty and left out.", subject(spec), total - len(annotations), total)
    data = {"images": found, "annotations": annotations, "categories": [{"id": 1, "name": "face"}]}
    file.write_text(json.dumps(data), encoding="utf-8")


def _parse(spec: DatasetSpec, table: Path) -> Iterator[tuple[str, list[list[int]]]]:
    """Name and rows of numbers of each image: its name, the number of faces, and a line for each, or one of zeros.

    Raises:
        ConfigError: naming the line that is not as expected.
    """
    lines = read_text(spec, "ROOT", table).rstrip().splitlines()
    start = 0
    while start < len(lines):
        try:
            stop = start + 2 + max(int(lines[start + 1]), 1)
            faces = [[int(word) for word in line.split()] for line in lines[start + 2 : stop]]
        except (ValueError, IndexError) as error:
            raise fail(spec, f"{table}, after line {start + 1}: a number was expected ({error}).") from error
        if stop > len(lines) or any(len(face) != _COLUMNS for face in faces):
            text = f"{stop - start - 2} lines of {_COLUMNS} numbers are expected."
            raise fail(spec, f"{table}, line {start + 1}: after {lines[start]!r} and the number of faces, {text}")
        yield lines[start].strip(), faces
        start = stop


def _check_images(spec: DatasetSpec, images: Path, names: Sequence[str]) -> None:
    problems = Problems(subject(spec))
    for name in names:
        if not (images / name).is_file():
            problems.add("missing images", f"there is no image {images / name}.")
    raise_if_any(problems)


def _boxes(faces: Sequence[Sequence[int]], width: int, height: int) -> Iterator[dict[str, Any]]:
    """Boxes [x, y, width, height] clipped to their image, without empty ones such as stand for "no face".

    Faces that are marked invalid become crowds: they are not learnt, and finding them is neither right nor wrong.
    """
    for face in faces:
        x, y, w, h = face[:4]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x1 > x0 and y1 > y0:
            box = [x0, y0, x1 - x0, y1 - y0]
            yield {"bbox": box, "area": box[2] * box[3], "iscrowd": int(face[_INVALID] > 0)}
