"""A whole small project on disk: images, annotations and a config of three sources that trains in seconds."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode
from disk_data import NAMES, SIZE, write_data

from xlearner_d2 import load_config
from xlearner_d2.engine.run import run, validate

ROOT = Path(__file__).resolve().parents[2]


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
