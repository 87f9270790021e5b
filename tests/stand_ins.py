"""Small data sets where a config looks for its own, so that it can be checked without these."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from xlearner_d2 import load_config
from xlearner_d2.specs import DatasetSpec, parse_datasets

WIDTH, HEIGHT, COUNT = 64, 48, 12
CLASSES = ("ant", "bee", "cat")


def write_for(config: Path, root: Path) -> None:
    """Twelve pictures of noise for each data set of a config, four of each of three classes."""
    problems: list[str] = []
    for spec in parse_datasets(load_config(config).XLEARNER.DATASETS, problems):
        if spec.classes:
            file = root / spec.classes
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{name}\n" for name in CLASSES))
        WRITERS[spec.format](spec, root)
    assert problems == []


def save_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_folders(spec: DatasetSpec, root: Path) -> None:
    for number in range(COUNT):
        save_noise(root / spec.images / CLASSES[number % 3] / f"{number}.jpg", number)


def write_coco(spec: DatasetSpec, root: Path) -> None:
    shape = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": number, "file_name": f"{number}.jpg", **shape} for number in range(COUNT)]
    for image in images:
        save_noise(root / spec.images / image["file_name"], image["id"])
    corners = [[8, 8, 40, 8, 40, 30, 8, 30]]
    shape = {"bbox": [8, 8, 32, 22], "area": 704, "iscrowd": 0, "segmentation": corners}
    annotations = [{"id": n + 1, "image_id": n, "category_id": 1 + n % 3, **shape} for n in range(COUNT)]
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, 1)]
    file = root / spec.annotations
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_voc(spec: DatasetSpec, root: Path) -> None:
    folder = root / spec.root
    names = [f"{spec.split}{number}" for number in range(COUNT)]
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_noise(folder / f"JPEGImages/{name}.jpg", number)
        box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
        facts = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
        item = f"<object><name>{CLASSES[number % 3]}</name>{facts}{box}</object>"
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{item}</annotation>")
    (folder / f"ImageSets/Main/{spec.split}.txt").write_text("\n".join(names) + "\n")


def write_labels(spec: DatasetSpec, root: Path) -> None:
    labels = np.arange(HEIGHT * WIDTH, dtype=np.int64).reshape(HEIGHT, WIDTH) * 3 // (HEIGHT * WIDTH)
    (root / spec.labels).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        save_noise(root / spec.images / f"{number}.jpg", number)
        Image.fromarray(labels.astype(np.uint8)).save(root / spec.labels / f"{number}.png")


WRITERS = {"image_folder": write_folders, "coco": write_coco, "voc": write_voc, "sem_seg": write_labels}
