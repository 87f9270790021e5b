"""Small data sets of each format, written to disk for the tests of their readers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.specs import DatasetSpec

COCO_SPEC = DatasetSpec(name="x_coco", format="coco", images="coco/images", annotations="coco/boxes.json")
VOC_SPEC = DatasetSpec(name="x_voc", format="voc", root="voc", split="train")
SEM_SPEC = DatasetSpec(
    name="x_sem", format="sem_seg", images="sem/images", labels="sem/labels", classes="sem/names.txt"
)
FOLDER_SPEC = DatasetSpec(name="x_folder", format="image_folder", images="folder/train")
OBJECT = (
    "<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def save_image(path: Path, *, width: int = 12, height: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def coco_json() -> dict[str, Any]:
    """Two images, one without annotations; category ids neither sorted nor contiguous."""
    annotation = {"image_id": 1, "iscrowd": 0, "area": 12}
    return {
        "images": [
            {"id": 2, "file_name": "b.jpg", "width": 12, "height": 8},
            {"id": 1, "file_name": "a.jpg", "width": 12, "height": 8},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {**annotation, "id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]},
            {**annotation, "id": 2, "category_id": 3, "bbox": [0, 0, 2.5, 2]},
        ],
    }


def write_coco(root: Path, data: Any) -> None:
    for name in ("a.jpg", "b.jpg"):
        save_image(root / "coco/images" / name)
    (root / "coco/boxes.json").write_text(data if isinstance(data, str) else json.dumps(data))


def write_voc(root: Path, names: tuple[str, ...] = ("a", "b"), *, suffix: str = ".jpg") -> None:
    folder = root / "voc"
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in names:
        save_image(folder / "JPEGImages" / f"{name}{suffix}")
        write_xml(root, name, OBJECT.format("dog", 1, 2, 12, 8) + OBJECT.format("cat", 3, 3, 5, 5.5))
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"{name}\n" for name in names))


def write_xml(root: Path, name: str, objects: str, *, size: str = "<width>12</width><height>8</height>") -> None:
    text = f"<annotation>\n<size>{size}</size>\n{objects}</annotation>\n"
    (root / "voc/Annotations" / f"{name}.xml").write_text(text)


def write_sem(root: Path, names: tuple[str, ...] = ("a", "b", "c"), *, suffix: str = ".jpg") -> None:
    for name in names:
        save_image(root / "sem/images" / f"{name}{suffix}")
        (root / "sem/labels").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 12), np.uint8)).save(root / "sem/labels" / f"{name}.png")
    (root / "sem/names.txt").write_text("road\nsky\n")


def write_folder(root: Path) -> None:
    for name in ("cat/1.jpg", "cat/deep/2.PNG", "dog/1.jpg"):
        save_image(root / "folder/train" / name)


def read(spec: DatasetSpec, root: Path) -> list[dict[str, Any]]:
    register_datasets([spec], root)
    return DatasetCatalog.get(spec.name)


def changed(spec: DatasetSpec, **values: Any) -> DatasetSpec:
    return DatasetSpec(**{**vars(spec), **values})
