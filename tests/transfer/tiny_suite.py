"""A transfer suite on disk that is measured in seconds, and the checkpoints of backbones to measure."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from disk_data import NAMES, SIZE, write_data
from torch import nn

from xlearner_d2 import load_config
from xlearner_d2.checkpoint.export import export_student, save_expanded
from xlearner_d2.modeling.expanded import STAGES, build_branch, build_expanded_backbone
from xlearner_d2.specs import TaskSpec
from xlearner_d2.transfer.suite import Suite, parse_suite

ROOT = Path(__file__).resolve().parents[2]
NARROW = {"STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 16}


def fine_tune(metric: str, config: str, *opts: Any, **other: Any) -> dict[str, Any]:
    """A protocol that trains for two steps."""
    short = ["SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.01]
    size = ["INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.MIN_SIZE_TEST", SIZE, "INPUT.CLASSIFICATION.SIZE", SIZE]
    opts = (*short, *size, "MODEL.FPN.OUT_CHANNELS", 16, *opts)
    return {
        "KIND": "fine_tune",
        "METRIC": metric,
        "CONFIG": config,
        "IMS_PER_BATCH": 4,
        "OPTS": list(opts),
        **other,
    }


def content(data: Path) -> dict[str, Any]:
    """A suite of one set per family on the data in a folder."""
    heads = "configs/transfer/heads"
    return {
        "_BASE_": str(ROOT / "configs/base.yaml"),
        "MODEL": {"DEVICE": "cpu", "RESNETS": dict(NARROW)},
        "XLEARNER": {
            "DATASETS": {
                "s_pics": {"FORMAT": "image_folder", "IMAGES": str(data / "pics")},
                "s_boxes": {
                    "FORMAT": "coco",
                    "IMAGES": str(data / "boxes"),
                    "ANNOTATIONS": str(data / "boxes.json"),
                },
                "s_areas": {
                    "FORMAT": "sem_seg",
                    "CLASSES": list(NAMES),
                    "IMAGES": str(data / "areas/images"),
                    "LABELS": str(data / "areas/labels"),
                },
            }
        },
        "TRANSFER": {
            "NAME": "tiny",
            "PROTOCOLS": {
                "probe": {"KIND": "linear_probe", "METRIC": "top1", "IMAGE_SIZE": SIZE},
                "knn": {"KIND": "knn", "METRIC": "top1", "IMAGE_SIZE": SIZE, "K": 3},
                "few": {
                    "KIND": "linear_probe",
                    "METRIC": "mean_class_acc",
                    "IMAGE_SIZE": SIZE,
                    "IMAGES_PER_CLASS": 2,
                },
                "tuned": fine_tune("classification/top1", "configs/heads/classifier.yaml"),
                "dense": fine_tune("bbox/AP", f"{heads}/retinanet.yaml"),
                "linear": fine_tune("sem_seg/mIoU", f"{heads}/linear_segmentation.yaml"),
            },
            "SETS": {
                "pics": one_set("classification", "s_pics", "probe", "knn"),
                "boxes": one_set("detection", "s_boxes", "dense"),
                "areas": one_set("segmentation", "s_areas", "linear"),
            },
        },
        "SOLVER": {"AMP": {"ENABLED": False}},
        "DATALOADER": {"NUM_WORKERS": 0},
    }


def one_set(family: str, data: str, *protocols: str) -> dict[str, Any]:
    """A record of ``TRANSFER.SETS``, tested on its training data."""
    return {"FAMILY": family, "TRAIN": [data], "TEST": data, "PROTOCOLS": list(protocols)}


class TinySuite:
    """A folder with data, a suite file, and checkpoints."""

    def __init__(self, root: Path):
        self.root = root
        self.file = root / "suite.yaml"
        write_data(root / "data")
        self.content = content(root / "data")
        self.write()

    def write(self) -> None:
        """Bring the file up to date with ``content``."""
        self.file.write_text(yaml.safe_dump(copy.deepcopy(self.content), sort_keys=False))  # without YAML's references

    def load(self, *opts: Any) -> CfgNode:
        return load_config(self.file, [str(opt) for opt in opts])

    def parse(self, *opts: Any) -> Suite:
        return parse_suite(self.load(*opts))

    def student(self, name: str = "student.pth", *, seed: int = 7, opts: Sequence[Any] = ()) -> Path:
        """A ResNet file of random weights."""
        cfg = self.load(*opts)
        torch.manual_seed(seed)
        export_student(build_branch(cfg, out_features=STAGES), cfg, self.root / name)
        return self.root / name

    def expanded(self, *opts: Any, name: str = "expanded.pth", tasks: Sequence[str] = ("labels", "objects")) -> Path:
        """An expanded checkpoint whose reconciliation layers have left zero."""
        cfg = self.load(*opts)
        torch.manual_seed(8)
        specs = [TaskSpec(name=task, sources=(task,), out_features=STAGES) for task in tasks]
        model = nn.Module()
        model.backbone = build_expanded_backbone(cfg, specs)
        for parameter in model.backbone.reconciliation.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3)
        save_expanded(model, cfg, specs, self.root / name)
        return self.root / name
