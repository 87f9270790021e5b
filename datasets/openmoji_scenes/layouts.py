"""Standard layouts on disk: image folders, COCO json, and images with label PNGs.

For each kind of set there is a function that makes one item, in any process and in any order, and one that
finishes the folder from what the items returned, in order.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .compose import compose_dense, compose_scene, compose_single
from .polygons import mask_to_polygons
from .sets import SetSpec, class_names

SPLITS = ("train", "val")
_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to make.

    Attributes:
        spec: the set it belongs to.
        split: "train" or "val".
        index: its number within the split.
        folder: the set's folder.
        seed: seed of the whole run.
        size: side of the image, in pixels.
    """

    spec: SetSpec
    split: str
    index: int
    folder: Path
    seed: int
    size: int

    def rng(self) -> Generator:
        """A generator that depends on nothing but the set's name, the split, the index and the seed."""
        key = f"{self.seed}/{self.spec.name}/{self.split}/{self.index}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    path.write_bytes(data.tobytes())


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _make_classified(item: Item) -> None:
    names = class_names(item.spec)
    class_id = item.index % len(names)
    image = compose_single(item.spec, class_id, item.rng(), item.size)
    _write_jpeg(item.folder / item.split / names[class_id] / f"{item.index:05d}.jpg", image)


def _make_detected(item: Item) -> dict[str, Any]:
    """Returns the image's COCO record with its ``annotations``, which have no ids yet."""
    image, scene = compose_scene(item.spec, item.rng(), item.size)
    name = f"{item.index:05d}.jpg"
    _write_jpeg(item.folder / item.split / name, image)
    annotations = [
        _annotation(mask, image_id=item.index + 1, category_id=class_id + 1)
        for mask, class_id in zip(scene.masks(), scene.class_ids, strict=True)
    ]
    size = {"width": item.size, "height": item.size}
    return {"id": item.index + 1, "file_name": name, **size, "annotations": annotations}


def _annotation(mask: NDArray[np.bool_], *, image_id: int, category_id: int) -> dict[str, Any]:
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": mask_to_polygons(mask),
    }


def _make_labelled(item: Item) -> None:
    image, labels = compose_dense(item.spec, item.rng(), item.size)
    _write_jpeg(item.folder / "images" / item.split / f"{item.index:05d}.jpg", image)
    _, data = cv2.imencode(".png", labels)
    (item.folder / "masks" / item.split / f"{item.index:05d}.png").write_bytes(data.tobytes())


def _finish_with_classes(folder: Path, spec: SetSpec, results: dict[str, list[Any]]) -> None:
    _write_lines(folder / "classes.txt", class_names(spec))


def _finish_coco(folder: Path, spec: SetSpec, results: dict[str, list[Any]]) -> None:
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names(spec), 1)]
    licence = {"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"}
    for split, records in results.items():
        images = [{key: value for key, value in record.items() if key != "annotations"} for record in records]
        annotations = [annotation for record in records for annotation in record["annotations"]]
        content = {
            "info": {"description": f"{spec.name} {split}, composed of OpenMoji artwork"},
            "licenses": [licence],
            "categories": categories,
            "images": images,
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
        }
        text = json.dumps(content, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one kind of set lies on disk.

    Attributes:
        folders: the folders below the set's, from its class names.
        make: makes one image; runs in any process.
        finish: writes what needs the results of ``make`` of all images, by split.
    """

    folders: Callable[[list[str]], list[str]]
    make: Callable[[Item], Any]
    finish: Callable[[Path, SetSpec, dict[str, list[Any]]], None]


LAYOUTS: dict[str, Layout] = {
    "classification": Layout(
        folders=lambda names: [f"{split}/{name}" for split in SPLITS for name in names],
        make=_make_classified,
        finish=_finish_with_classes,
    ),
    "detection": Layout(
        folders=lambda names: [*SPLITS, "annotations"],
        make=_make_detected,
        finish=_finish_coco,
    ),
    "segmentation": Layout(
        folders=lambda names: [f"{part}/{split}" for part in ("images", "masks") for split in SPLITS],
        make=_make_labelled,
        finish=_finish_with_classes,
    ),
}


def make_item(item: Item) -> Any:
    """Make one image; returns what the layout's ``finish`` wants to know of it."""
    return LAYOUTS[item.spec.kind].make(item)
