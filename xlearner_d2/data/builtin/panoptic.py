"""COCO panoptic: a json of segments, and one PNG per image that has the id of a segment in the colour of its pixels.

The records equal those of Detectron2's ``load_coco_panoptic_json``, which is not used because it takes every image for
a .jpg named like its PNG, and fails for unknown categories without naming them. Categories are numbered as in
Detectron2's "standard" sets: things and stuff together, in order of their ids.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...specs import DatasetSpec
from ..problems import Problems
from .coco import check_categories, check_images, parse_json
from .common import Records, add_to_catalogs, fail, find_folder, raise_if_any, subject


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``coco_panoptic``.

    Raises:
        ConfigError: with all problems of the json file, or if it or a folder is missing.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    labels = find_folder(spec, "LABELS", root / spec.labels)
    file = root / spec.annotations
    data = parse_json(spec, file)
    if not any("isthing" in item for item in data["categories"]):
        text = "no category has 'isthing', so this is no panoptic json. Boxes and masks of objects are of FORMAT coco."
        raise fail(spec, f"{file}: {text}")
    classes, things = _check(spec, data, file)
    numbers = {category: index for index, category in enumerate(classes)}
    names = list(classes.values())
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, file, images, labels, numbers, things),
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={key: number for key, number in numbers.items() if key in things},
        stuff_dataset_id_to_contiguous_id={key: number for key, number in numbers.items() if key not in things},
        panoptic_json=str(file),
        panoptic_root=str(labels),
        image_root=str(images),
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **_colours(data["categories"], classes),
    )


def _colours(categories: list[dict[str, Any]], classes: Mapping[int, str]) -> dict[str, list[list[int]]]:
    found = {item["id"]: item.get("color") for item in categories}
    colours = [colour for key in classes if isinstance(colour := found[key], list) and len(colour) == 3]
    if len(colours) < len(classes):
        return {}
    return {"thing_colors": colours, "stuff_colors": colours}


def _check(spec: DatasetSpec, data: dict[str, Any], file: Path) -> tuple[dict[int, str], set[int]]:
    """Class names by category id, and the ids of things."""
    problems = Problems(subject(spec))
    classes = check_categories(data["categories"], file, problems)
    things = set()
    for number, item in enumerate(data["categories"]):
        if item.get("isthing") not in (0, 1):
            text = f"{file}: categories[{number}] has 'isthing' {item.get('isthing')!r}, but 0 or 1 is expected."
            problems.add("wrong categories", text)
        elif item["isthing"]:
            things.add(item.get("id"))
    images = check_images(data["images"], file, problems)
    seen: set[Any] = set()
    for number, item in enumerate(data["annotations"]):
        where = f"{file}: annotations[{number}]"
        image = item.get("image_id")
        if not isinstance(image, int | str) or image not in images or image in seen:
            text = f"{where} has the image_id {image!r}, but one of the ids in 'images', each once, is expected."
            problems.add("annotations of unknown images", text)
        seen.add(image)
        if not isinstance(item.get("file_name"), str) or not item["file_name"]:
            text = f"{where} has the file_name {item.get('file_name')!r}, but a PNG below LABELS is expected."
            problems.add("wrong file names", text)
        _check_segments(item.get("segments_info"), where, classes, problems)
    if not data["annotations"]:
        problems.add("empty lists", f"{file}: 'annotations' is empty, but at least one is expected.")
    raise_if_any(problems)
    return classes, things


def _check_segments(segments: Any, where: str, classes: Mapping[int, str], problems: Problems) -> None:
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        text = f"{where} has no list 'segments_info' of objects such as {{'id': 1, 'category_id': 1, …}}."
        problems.add("missing segments", text)
        return
    seen: set[Any] = set()
    for segment in segments:
        key, category = segment.get("id"), segment.get("category_id")
        if not isinstance(key, int) or not 0 < key < 256**3 or key in seen:
            expected = f"whole numbers from 1 to {256**3 - 1}, each once, are expected"
            problems.add("wrong segment ids", f"{where} has a segment of id {key!r}, but {expected}.")
        seen.add(key)
        if not isinstance(category, int) or category not in classes:
            text = f"{where}, segment {key!r}, has the category_id {category!r}, but one in 'categories' is expected."
            problems.add("segments of unknown categories", text)


def _read(
    spec: DatasetSpec, file: Path, images: Path, labels: Path, numbers: Mapping[int, int], things: set[int]
) -> Records:
    """One record per annotation, as of Detectron2, with the image's ``height`` and ``width``.

    ``segments_info`` has the number of each segment's class as ``category_id``, and ``isthing``.
    """
    data = parse_json(spec, file)
    by_id = {image["id"]: image for image in data["images"]}
    records = []
    for annotation in data["annotations"]:
        image = by_id[annotation["image_id"]]
        segments = [
            {**segment, "category_id": numbers[segment["category_id"]], "isthing": segment["category_id"] in things}
            for segment in annotation["segments_info"]
        ]
        records.append(
            {
                "file_name": str(images / image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": str(labels / annotation["file_name"]),
                "segments_info": segments,
            }
        )
    return records
