"""Tiny configs, models and batches that every test can build in well under a second."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import HealthCheck, settings

from xlearner_d2 import XLearner, add_xlearner_config

# One thread here and in the processes that tests start: results are then the same bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# How long an example takes depends on what else the machine does, and is no matter of a test. The same examples each
# time: what fails once fails again.
slow = [HealthCheck.too_slow]
settings.register_profile("xlearner_d2", deadline=None, suppress_health_check=slow, derandomize=True)
settings.load_profile("xlearner_d2")

CLASSES = 3
SIZE = 64


def _metadata() -> None:
    """Names, not data, for three label spaces; setting them twice alike is allowed."""
    names = ["cat", "dog", "eel"]
    MetadataCatalog.get("tiny_cls").set(classes=names, evaluator_type="classification")
    MetadataCatalog.get("tiny_det").set(thing_classes=names)
    MetadataCatalog.get("tiny_seg").set(stuff_classes=names, ignore_label=255, evaluator_type="sem_seg")


SOURCES: dict[str, dict[str, Any]] = {
    "pics": {"TASK": "classification", "CONFIG": "configs/heads/classifier.yaml", "TRAIN": ["tiny_cls"]},
    "boxes": {
        "TASK": "detection",
        "CONFIG": "configs/heads/light_mask_rcnn_fpn.yaml",
        "TRAIN": ["tiny_det"],
        "OPTS": ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16],
    },
    "areas": {
        "TASK": "segmentation",
        "CONFIG": "configs/heads/light_semantic_fpn.yaml",
        "TRAIN": ["tiny_seg"],
        "OPTS": ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32],
    },
}


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """Three sources of three tasks on a narrow ResNet-50; nothing on disk."""
    _metadata()
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "XLearner"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.XLEARNER.SOURCES = CfgNode({name: CfgNode(dict(record)) for name, record in SOURCES.items()}, new_allowed=True)
    return cfg


@pytest.fixture
def make_model(tiny_cfg: CfgNode) -> Callable[..., XLearner]:
    """Build the tiny model with some settings changed: ``make_model("XLEARNER.SHARING", "separate")``."""

    def make(*opts: Any, without: tuple[str, ...] = (), seed: int = 0) -> XLearner:
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(list(opts))
        for name in without:
            del cfg.XLEARNER.SOURCES[name]
        torch.manual_seed(seed)
        return build_model(cfg)

    return make


def image(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def instances(generator: torch.Generator) -> Instances:
    """Two boxes with their filled masks."""
    corners = torch.randint(0, SIZE // 2, (2, 2), generator=generator)
    boxes = torch.cat([corners, corners + SIZE // 3], dim=1).float()
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    found = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    found.gt_classes = torch.randint(0, CLASSES, (2,), generator=generator)
    return found


@pytest.fixture
def make_batches() -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Random mapped records of the named sources: ``make_batches("pics", seed=1)``."""

    def make(*sources: str, seed: int = 0, count: int = 2) -> dict[str, list[dict[str, Any]]]:
        generator = torch.Generator().manual_seed(seed)

        def record(source: str) -> dict[str, Any]:
            found: dict[str, Any] = {"image": image(generator), "height": SIZE, "width": SIZE, "source": source}
            if source == "pics":
                found["category_id"] = int(torch.randint(0, CLASSES, (), generator=generator))
            elif source == "boxes":
                found["instances"] = instances(generator)
            else:
                found["sem_seg"] = torch.randint(0, CLASSES, (SIZE, SIZE), generator=generator)
            return found

        return {source: [record(source) for _ in range(count)] for source in sources or SOURCES}

    return make


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``$DETECTRON2_DATASETS`` with a small share of the OpenMoji data, by the command that makes them."""
    folder, root = tmp_path_factory.mktemp("data"), Path(__file__).resolve().parents[1]
    make = [sys.executable, "datasets/prepare_openmoji.py", "--scale", "0.1", "--output", str(folder / "openmoji")]
    subprocess.run(make, cwd=root, check=True, capture_output=True)
    return folder


@pytest.fixture
def batch(make_batches: Callable[..., Any]) -> list[dict[str, Any]]:
    """Two images with boxes, masks and semantic labels, of the source ``one``."""
    made = make_batches("boxes", "areas")
    return [{**area, **box, "source": "one"} for box, area in zip(made["boxes"], made["areas"], strict=True)]
