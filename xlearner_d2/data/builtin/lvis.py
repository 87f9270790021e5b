"""LVIS json: COCO's format, with the categories that were looked for in each image.

The records equal those of Detectron2's ``load_lvis_json``, which is not used because it needs the package lvis, takes
category ids for contiguous from 1 on, and reports what is wrong without naming file and record.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from ...specs import DatasetSpec
from ..polygons import no_polygon
from ..problems import Problems
from .coco import check_annotations, check_categories, check_images, parse_json
from .common import Records, add_to_catalogs, fail, find_folder, raise_if_any, subject

#: Of an image: categories that are not in it, and categories of which not every object has an annotation.
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``lvis``.

    Raises:
        ConfigError: with all problems of the json file, or if it or the folder of images is missing.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    file = root / spec.annotations
    data = _parse(spec, file)
    if not any("neg_category_ids" in image for image in data["images"]):
        raise fail(spec, f"{file}: no image has 'neg_category_ids', so this is no LVIS json. Use FORMAT coco.")
    problems = Problems(subject(spec))
    classes = check_categories(data["categories"], file, problems)
    ids = check_images(data["images"], file, problems)
    check_annotations(data["annotations"], file, classes, ids, problems, num_keypoints={})
    _check_federated(data, file, classes, problems)
    raise_if_any(problems)
    _check_polygons(data["annotations"], file, problems)
    raise_if_any(problems)
    by_id = {item["id"]: item for item in data["categories"]}
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, file, images, list(classes)),
        json_file=str(file),
        image_root=str(images),
        evaluator_type="lvis",
        thing_classes=list(classes.values()),
        thing_dataset_id_to_contiguous_id={category: index for index, category in enumerate(classes)},
        # What samplers and losses of Detectron2's projects for LVIS read.
        class_image_count=[{"id": key, "image_count": by_id[key].get("image_count", 0)} for key in classes],
    )


def _parse(spec: DatasetSpec, file: Path) -> dict[str, list[Any]]:
    """The json, with a ``file_name`` for each image: LVIS 1.0 has it as the end of COCO's address alone."""
    data = parse_json(spec, file)
    for image in data["images"]:
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    return data


def _check_federated(data: dict[str, Any], file: Path, classes: Mapping[int, str], problems: Problems) -> None:
    for number, item in enumerate(data["images"]):
        for key in _FEDERATED:
            found = item.get(key)
            if not isinstance(found, list) or not all(isinstance(c, int) and c in classes for c in found):
                text = "a list of ids in 'categories' is expected. Without such lists, use FORMAT coco"
                problems.add("wrong category lists", f"{file}: images[{number}] has the {key} {found!r}, but {text}.")
    for number, item in enumerate(data["categories"]):
        if item.get("frequency") not in ("r", "c", "f"):
            got, text = item.get("frequency"), "r, c or f (rare, common, frequent) is expected"
            problems.add("wrong frequencies", f"{file}: categories[{number}] has the frequency {got!r}, but {text}.")


def _check_polygons(annotations: list[dict[str, Any]], file: Path, problems: Problems) -> None:
    """Those that Detectron2's reader of COCO json leaves out, and its reader of LVIS refuses."""
    for number, item in enumerate(annotations):
        if isinstance(mask := item.get("segmentation"), list) and (wrong := no_polygon(mask)):
            text = f"{file}: annotations[{number}] (id {item.get('id')!r}) {wrong}."
            problems.add("malformed polygons", text)


def _read(spec: DatasetSpec, file: Path, images: Path, categories: list[int]) -> Records:
    """Detectron2 records, in order of their ids."""
    data = _parse(spec, file)
    numbers = {category: index for index, category in enumerate(categories)}
    by_image: dict[Any, Records] = defaultdict(list)
    for item in data["annotations"]:
        found = {"bbox": item["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": numbers[item["category_id"]]}
        if item.get("segmentation"):
            found["segmentation"] = item["segmentation"]
        by_image[item["image_id"]].append(found)
    return [
        {
            "file_name": str(images / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            **{key: image[key] for key in _FEDERATED},
            "annotations": by_image.get(image["id"], []),
        }
        for image in sorted(data["images"], key=lambda image: image["id"])
    ]
