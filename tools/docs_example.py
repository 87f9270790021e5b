"""Make a small example of own data in this folder: data/ and the README's config as mine.yaml, for small images.

python tools/docs_example.py
export DETECTRON2_DATASETS=data

Eight images of 96 pixels a split, drawn here: birds/ (a folder for each class), cells/ (Pascal VOC XML) and coco/ (COCO
json with masks). mine.yaml has two steps, so that what the documentation does with it takes seconds; nothing is learnt.
larger.yaml has one source more.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE, COUNT = 96, 8
SMALL = ["INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.MAX_SIZE_TRAIN", SIZE, "INPUT.MIN_SIZE_TEST", SIZE]
BIRDS, CELLS = ("heron", "stork"), ("round", "square")


def draw(number: int) -> tuple[np.ndarray, list[int]]:
    """An image with one bright square, and the square's x, y, width and height."""
    random = np.random.default_rng(number)
    image = random.integers(0, 90, (SIZE, SIZE, 3), dtype=np.uint8)
    x, y = (int(value) for value in random.integers(2, 40, 2))
    image[y : y + 50, x : x + 50, number % 3] = 250
    return image, [x, y, 50, 50]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_birds(root: Path) -> None:
    for number in range(2 * COUNT):
        split = "train" if number < COUNT else "val"
        save(root / "birds" / split / BIRDS[number % 2] / f"{number}.png", draw(number)[0])


def write_cells(root: Path) -> None:
    for number in range(2 * COUNT):
        folder = root / "cells" / ("train" if number < COUNT else "val")
        image, (x, y, width, height) = draw(number)
        save(folder / f"{number}.png", image)
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
        flags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        found = f"<object><name>{CELLS[number % 2]}</name>{flags}<bndbox>{corners}</bndbox></object>"
        size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{number}.png</filename>{size}{found}</annotation>"
        (folder / f"{number}.xml").write_text(text, encoding="utf-8")


def write_coco(root: Path, split: str, first: int) -> None:
    images, annotations = [], []
    for number in range(first, first + COUNT):
        image, (x, y, width, height) = draw(number)
        save(root / "coco" / split / f"{number:012}.jpg", image)
        images.append({"id": number, "file_name": f"{number:012}.jpg", "width": SIZE, "height": SIZE})
        outline = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        category = COCO_CATEGORIES[number % 3]["id"]
        annotation = {"id": number, "image_id": number, "category_id": category, "bbox": [x, y, width, height]}
        annotations.append({**annotation, "segmentation": outline, "area": width * height, "iscrowd": 0})
    things = [{"id": item["id"], "name": item["name"]} for item in COCO_CATEGORIES if item["isthing"]]
    file = root / "coco/annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": things}), encoding="utf-8")


def read_config() -> dict[str, Any]:
    """The config that the README shows."""
    found = re.search(r"^```yaml\n(_BASE_.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found, "README.md shows no config"
    config: dict[str, Any] = yaml.safe_load(found[1])
    return config


def shorten(config: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a ResNet-18 on small images, four of each source."""
    config["MODEL"] = {"RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}}
    config["SOLVER"] = {"MAX_ITER": 2, "WARMUP_ITERS": 1}
    config["DATALOADER"] = {"NUM_WORKERS": 0}
    config["XLEARNER"]["SQUEEZE"] = {"SOLVER": {"MAX_ITER": 1, "WARMUP_ITERS": 1}, "BN_RECALIBRATION_BATCHES": 1}
    for source in config["XLEARNER"]["SOURCES"].values():
        source["IMS_PER_BATCH"] = 8  # which eight workers can share
        source["OPTS"] = ["INPUT.CLASSIFICATION.SIZE", SIZE] if source["TASK"] == "classification" else SMALL
    return config


def write_all(root: Path) -> None:
    data = root / "data"
    write_birds(data)
    write_cells(data)
    write_coco(data, "train2017", 100)
    write_coco(data, "val2017", 200)
    (root / "mine.yaml").write_text(yaml.safe_dump(shorten(read_config()), sort_keys=False), encoding="utf-8")
    more = {
        "TASK": "detection",
        "CONFIG": "configs/heads/light_retinanet_fpn.yaml",
        "TRAIN": ["cells_val"],
        "OPTS": SMALL,
    }
    larger = {"_BASE_": "mine.yaml", "XLEARNER": {"SOURCES": {"more_cells": more}}, "OUTPUT_DIR": "output/larger"}
    (root / "larger.yaml").write_text(yaml.safe_dump(larger, sort_keys=False), encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        made = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
        others = [path for path in made if path.exists() and path.read_bytes() != (folder / path).read_bytes()]
        if others:
            sys.exit(f"error: {others[0]} is there already, and is not from this example. Run it in another folder.")
        for path in made:  # not their folders, whose permissions are those of a temporary one
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, path)
    print("data/, mine.yaml and larger.yaml are there: export DETECTRON2_DATASETS=data")


if __name__ == "__main__":
    main()
