"""A whole small project on disk: images, annotations and a config of three sources that trains in seconds."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.config import CfgNode
from PIL import Image

from xlearner_d2 import load_config
from xlearner_d2.engine.run import run, validate

ROOT = Path(__file__).resolve().parents[2]
SIZE, COUNT = 64, 8
NAMES = ("cat", "dog", "eel")


def draw(rng: np.random.Generator, label: int) -> tuple[np.ndarray, list[int]]:
    """An image with one bright square of the label's colour, and its box (x, y, width, height)."""
    image = rng.integers(0, 90, (SIZE, SIZE, 3), dtype=np.uint8)
    x, y = (int(value) for value in rng.integers(4, 28, 2))
    image[y : y + 28, x : x + 28, label] = 250
    return image, [x, y, 28, 28]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_data(root: Path) -> None:
    """An image folder, a COCO json and a semantic set with the same kind of images."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(COUNT):
        label = number % len(NAMES)
        image, (x, y, w, h) = draw(rng, label)
        save(root / "pics" / NAMES[label] / f"{number}.png", image)
        save(root / "boxes" / f"{number}.png", image)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": label + 1,
                "bbox": [x, y, w, h],
                "segmentation": outline,
                "area": w * h,
                "iscrowd": 0,
            }
        )
        save(root / "areas/images" / f"{number}.png", image)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[y : y + h, x : x + w] = label
        save(root / "areas/labels" / f"{number}.png", mask)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))


def config(root: Path) -> dict[str, Any]:
    """The config of a run whose two stages take two steps each."""
    light = ["MODEL.FPN.OUT_CHANNELS", 16, "INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.MIN_SIZE_TEST", SIZE]
    classify = ["INPUT.CLASSIFICATION.SIZE", SIZE]
    segment = [*light, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
    folders = {"IMAGES": "areas/images", "LABELS": "areas/labels"}

    def source(task: str, head: str, data: str, opts: list[Any]) -> dict[str, Any]:
        head = f"configs/heads/{head}.yaml"
        return {"TASK": task, "CONFIG": head, "TRAIN": [data], "TEST": [data], "IMS_PER_BATCH": 2, "OPTS": opts}

    return {
        "_BASE_": str(ROOT / "configs/base.yaml"),
        "MODEL": {
            "DEVICE": "cpu",
            "RESNETS": {"STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 16},
        },
        "XLEARNER": {
            "DATASETS": {
                "t_pics": {"FORMAT": "image_folder", "IMAGES": "pics"},
                "t_boxes": {"FORMAT": "coco", "IMAGES": "boxes", "ANNOTATIONS": "boxes.json"},
                "t_areas": {"FORMAT": "sem_seg", "CLASSES": list(NAMES), **folders},
            },
            "SOURCES": {
                "pics": source("classification", "classifier", "t_pics", classify),
                "boxes": source("detection", "light_mask_rcnn_fpn", "t_boxes", light),
                "areas": source("segmentation", "light_semantic_fpn", "t_areas", segment),
            },
            "PROBES": {"pics": {"TRAIN": "t_pics", "TEST": "t_pics", "IMAGE_SIZE": SIZE}},
            "SQUEEZE": {"SOLVER": {"MAX_ITER": 2}, "BN_RECALIBRATION_BATCHES": 1},
        },
        "SOLVER": {"MAX_ITER": 2, "WARMUP_ITERS": 1, "AMP": {"ENABLED": False}, "CHECKPOINT_PERIOD": 1},
        "DATALOADER": {"NUM_WORKERS": 0},
        "OUTPUT_DIR": str(root / "out"),
    }


class Project:
    """A folder with data and a config, and how to run it in this process."""

    def __init__(self, root: Path):
        self.root = root
        self.file = root / "config.yaml"
        write_data(root / "data")
        self.write(config(root))

    def write(self, content: dict[str, Any]) -> None:
        self.content = content
        self.file.write_text(yaml.safe_dump(content))

    def run(self, *opts: Any, **flags: bool) -> dict[str, Any]:
        options = {"dry_run": False, "resume": False, "eval_only": False, **flags}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DETECTRON2_DATASETS", str(self.root / "data"))
            return run(self.load(*opts), argparse.Namespace(**options))

    def load(self, *opts: Any) -> CfgNode:
        return load_config(self.file, [str(opt) for opt in opts])

    def dry_run(self, *opts: Any) -> str:
        """The plan in words."""
        options = argparse.Namespace(dry_run=True, resume=False, eval_only=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DETECTRON2_DATASETS", str(self.root / "data"))
            return validate(self.load(*opts), options, world_size=1)[1]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)
