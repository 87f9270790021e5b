"""Small data sets of the kinds that tests/disk_data.py has not."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from disk_data import NAMES, SIZE, draw, save

from xlearner_d2.extensions import id2rgb

COUNT = 4
STUFF = ("sea", "sky")


def write_kinds(root: Path) -> None:
    """Images with one square, an object of one of three classes, in front of the sea and the sky."""
    rng = np.random.default_rng(1)
    images, keypoints, panoptic, proposals = [], [], [], []
    for number in range(COUNT):
        label = number % len(NAMES)
        image, (x, y, w, h) = draw(rng, label)
        save(root / "kinds" / f"{number}.jpg", image)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": SIZE, "height": SIZE})
        points = [x, y, 2, x + w, y, 2, x + w // 2, y + h, 1]
        keypoints.append(
            {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "keypoints": points}
        )
        segments = np.where(np.arange(SIZE)[:, None] < SIZE // 2, 300, 7) * np.ones((1, SIZE), dtype=int)
        segments[y : y + h, x : x + w] = 70000
        save(root / "panoptic" / f"{number}.png", id2rgb(segments))
        infos = [{"id": 70000, "category_id": 10 + label, "iscrowd": 0, "area": w * h, "bbox": [x, y, w, h]}]
        stuff = {"iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
        infos += [{"id": 300, "category_id": 5, **stuff}, {"id": 7, "category_id": 90, **stuff}]
        panoptic.append({"image_id": number, "file_name": f"{number}.png", "segments_info": infos})
        depth = np.full((SIZE, SIZE), 4000, np.uint16)
        depth[y : y + h, x : x + w] = 1000
        depth[0] = 0
        save(root / "depth" / f"{number}.png", depth)
        boxes = np.array([[x, y, x + w, y + h], [0, 0, 20, 20]], dtype=np.float32)
        proposals.append((number, boxes, np.array([2.0, -1.0], dtype=np.float32)))
    categories = [{"id": 1, "name": "face", "keypoints": ["left_eye", "right_eye", "nose"]}]
    write_json(root / "keypoints.json", images=images, annotations=keypoints, categories=categories)
    categories = [{"id": 10 + n, "name": name, "isthing": 1} for n, name in enumerate(NAMES)]
    categories += [{"id": 5, "name": "sea", "isthing": 0}, {"id": 90, "name": "sky", "isthing": 0}]
    write_json(root / "panoptic.json", images=images, annotations=panoptic, categories=categories)
    ids, boxes, logits = zip(*proposals, strict=True)
    content = {"ids": ids, "boxes": boxes, "objectness_logits": logits}
    (root / "proposals.pkl").write_bytes(pickle.dumps(content))


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def register_panoptic(name: str, root: Path) -> None:
    """As Detectron2 documents it: one numbering of all categories, here with a stuff class before the things."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    order = [5, 10, 11, 12, 90]
    names = [STUFF[0], *NAMES, STUFF[1]]
    numbers = {category: number for number, category in enumerate(order)}
    metadata = {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_dataset_id_to_contiguous_id": {c: n for c, n in numbers.items() if c in (10, 11, 12)},
        "stuff_dataset_id_to_contiguous_id": {c: n for c, n in numbers.items() if c in (5, 90)},
    }
    folder, labels, file = (str(root / part) for part in ("kinds", "panoptic", "panoptic.json"))
    register_coco_panoptic(name, metadata, folder, labels, file)
