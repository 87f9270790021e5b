"""COCO json: boxes, polygons, RLE masks and keypoints.

Read by Detectron2, after a check of what its reader would drop silently or report without naming file and record.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data.datasets import load_coco_json

from ...specs import DatasetSpec
from ..problems import Problems
from .common import add_to_catalogs, fail, find_folder, raise_if_any, read_text, subject
from .keypoints import keypoint_metadata, keypoint_names

_LISTS = ("images", "annotations", "categories")


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``coco``.

    Raises:
        ConfigError: with all problems of the json file, or if it or the folder of images is missing.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    file = root / spec.annotations
    classes, keypoints = _read_classes(spec, file)
    add_to_catalogs(
        spec.name,
        functools.partial(load_coco_json, str(file), str(images), spec.name),
        json_file=str(file),
        image_root=str(images),
        evaluator_type="coco",
        thing_classes=list(classes.values()),
        thing_dataset_id_to_contiguous_id={category: index for index, category in enumerate(classes)},
        **keypoints,
    )


def _read_classes(spec: DatasetSpec, file: Path) -> tuple[dict[int, str], dict[str, Any]]:
    """Validate the json.

    Returns:
        the class names by category id, in order of the ids as Detectron2 has them, and the metadata of keypoints.
    """
    data = parse_json(spec, file)
    if any("segments_info" in item for item in data["annotations"][:1]):
        raise fail(spec, f"{file} holds 'segments_info', so this is a panoptic json. Use FORMAT coco_panoptic.")
    problems = Problems(subject(spec))
    categories = check_categories(data["categories"], file, problems)
    images = check_images(data["images"], file, problems)
    keypoints = {
        key: len(keypoint_names(item)) for item in data["categories"] if isinstance(key := item.get("id"), int)
    }
    check_annotations(data["annotations"], file, categories, images, problems, num_keypoints=keypoints)
    raise_if_any(problems)
    return categories, keypoint_metadata(data["categories"], subject(spec))


def parse_json(spec: DatasetSpec, file: Path) -> dict[str, list[Any]]:
    """Read a json of ``images``, ``annotations`` and ``categories``.

    Raises:
        ConfigError: if it is missing or malformed, or if one of the three is no list of objects.
    """
    try:
        data = json.loads(read_text(spec, "ANNOTATIONS", file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise fail(spec, f"{file} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise fail(spec, f"{file} holds a {type(data).__name__}, but an object with {', '.join(_LISTS)} is expected.")
    problems = Problems(subject(spec))
    for key in _LISTS:
        if not isinstance(data.get(key), list):
            got = f"a {type(data[key]).__name__}" if key in data else "missing"
            problems.add("wrong keys", f"{file}: {key!r} is {got}, but a list is expected.")
        elif key != "annotations" and not data[key]:
            problems.add("empty lists", f"{file}: {key!r} is empty, but at least one is expected.")
        elif not all(isinstance(item, dict) for item in data[key]):
            problems.add("wrong lists", f"{file}: {key!r} holds something else than objects such as {{'id': 1, …}}.")
    raise_if_any(problems)
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_categories(items: list[dict[str, Any]], file: Path, problems: Problems) -> dict[int, str]:
    """Class names by category id, in order of the ids."""
    found: dict[int, str] = {}
    for number, item in enumerate(items):
        key, name = item.get("id"), item.get("name")
        if not isinstance(key, int) or isinstance(key, bool) or not isinstance(name, str) or not name:
            text = f"{file}: categories[{number}] is {item}, but a whole number 'id' and a 'name' are expected."
            problems.add("wrong categories", text)
        elif key in found or name in found.values():
            text = f"{file}: categories[{number}] repeats the id or name of another category (id {key}, name {name!r})."
            problems.add("repeated categories", text)
        else:
            found[key] = name
    return dict(sorted(found.items()))


def check_images(items: list[dict[str, Any]], file: Path, problems: Problems) -> set[Any]:
    """Ids of the images."""
    found: set[Any] = set()
    kinds = {type(item.get("id")) for item in items}
    if kinds != {int} and kinds != {str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        problems.add("wrong image ids", f"{file}: ids of images are of type {names}, but whole numbers are expected.")
        return found
    for number, item in enumerate(items):
        where = f"{file}: images[{number}] (id {item['id']})"
        if item["id"] in found:
            problems.add("repeated image ids", f"{where} has the id of another image, but ids should be unique.")
        found.add(item["id"])
        if not isinstance(item.get("file_name"), str) or not item["file_name"]:
            got = repr(item.get("file_name"))
            problems.add("wrong file names", f"{where} has the file_name {got}, but a path below IMAGES is expected.")
        for key in ("height", "width"):
            if type(item.get(key)) is not int or item[key] < 1:  # True is an int, too
                text = f"{where} has the {key} {item.get(key)!r}, but a whole positive number of pixels is expected."
                problems.add("wrong image sizes", text)
    return found


def check_annotations(
    items: list[dict[str, Any]],
    file: Path,
    categories: Mapping[int, str],
    images: set[Any],
    problems: Problems,
    *,
    num_keypoints: Mapping[int, int],
) -> None:
    """Collect what is wrong with annotations; ``num_keypoints`` is that of the categories that list any."""
    found: set[Any] = set()
    for number, item in enumerate(items):
        key = item.get("id")
        # The text is built only for a problem: there can be millions of annotations.
        if not isinstance(key, int | str) or key in found:
            what = "repeats the id of another annotation" if key is not None else "lacks an 'id'"
            _add(problems, "wrong annotation ids", file, number, item, f"{what}, but ids should be unique")
        else:
            found.add(key)
        _check_annotation(item, file, number, categories, images, problems)
        if item.get("keypoints"):
            _check_keypoints(item, file, number, num_keypoints, problems)


def _check_annotation(
    item: dict[str, Any],
    file: Path,
    number: int,
    categories: Mapping[int, str],
    images: set[Any],
    problems: Problems,
) -> None:
    category, image, box = item.get("category_id"), item.get("image_id"), item.get("bbox")
    if not isinstance(category, int) or category not in categories:
        text = f"has the category_id {category!r}, but one of the ids in 'categories' is expected"
        _add(problems, "annotations of unknown categories", file, number, item, text)
    if not isinstance(image, int | str) or image not in images:
        text = f"has the image_id {image!r}, but one of the ids in 'images' is expected"
        _add(problems, "annotations of unknown images", file, number, item, text)
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        text = f"has the bbox {box!r}, but four finite numbers [x, y, width, height] are expected"
        _add(problems, "malformed boxes", file, number, item, text)
    if item.get("segmentation") and not _is_mask(item["segmentation"]):
        text = "has a 'segmentation' that is neither a list of polygons [[x1, y1, x2, y2, …]] nor RLE {size, counts}"
        _add(problems, "malformed segmentations", file, number, item, text)
    if item.get("ignore", 0):
        text = "has 'ignore' set, which Detectron2 does not support; use 'iscrowd' or leave it out"
        _add(problems, "annotations to ignore", file, number, item, text)


def _check_keypoints(
    item: dict[str, Any], file: Path, number: int, num_keypoints: Mapping[int, int], problems: Problems
) -> None:
    keypoints, category = item["keypoints"], item.get("category_id")
    if not _are_numbers(keypoints):
        text = "has 'keypoints' that are no list of numbers [x1, y1, visibility1, …]"
        _add(problems, "malformed keypoints", file, number, item, text)
        return
    expected = num_keypoints.get(category, 0) if isinstance(category, int) else 0
    if expected and len(keypoints) != 3 * expected:
        text = (
            f"has {len(keypoints)} numbers of keypoints, but 3 for each of the {expected} of its category are expected"
        )
        _add(problems, "wrong numbers of keypoints", file, number, item, text)


def _is_mask(mask: Any) -> bool:
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            return False
        return isinstance(counts, str) or (isinstance(counts, list) and all(isinstance(run, int) for run in counts))
    return isinstance(mask, list) and all(map(_are_numbers, mask))


def _are_numbers(value: Any) -> bool:
    try:
        # The sum visits all numbers much faster than a test of each.
        return isinstance(value, list) and math.isfinite(math.fsum(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _add(problems: Problems, kind: str, file: Path, number: int, item: dict[str, Any], text: str) -> None:
    problems.add(kind, f"{file}: annotations[{number}] (id {item.get('id')!r}) {text}.")
