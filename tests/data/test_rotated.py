"""Rotated boxes: mapped, and evaluated with areas that shapely computes, where the compiled operators are missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import rotated_coco_evaluation
from detectron2.structures import BoxMode, Instances, RotatedBoxes
from PIL import Image
from shapely import affinity
from shapely.geometry import Polygon, box

from xlearner_d2.data.mappers import build_mapper
from xlearner_d2.evaluation.build import build_evaluator, main_metric
from xlearner_d2.settings import add_head_config

BOX = [20.0, 12.0, 10.0, 6.0, 30.0]


@pytest.fixture
def head() -> CfgNode:
    cfg = get_cfg()
    add_head_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RROIHeads", "RRPN"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (32,), "none"
    return cfg


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "0.png")
    upright = {"bbox": [2.0, 3.0, 8.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    turned = {"bbox": BOX, "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    crowd = {**turned, "iscrowd": 1}
    shape = {"image_id": 1, "height": 32, "width": 48}
    return {"file_name": str(tmp_path / "0.png"), **shape, "annotations": [turned, upright, crowd]}


@pytest.mark.parametrize("scale", [1, 2])
def test_rotated_boxes_are_resized(head: CfgNode, record: dict[str, Any], scale: int) -> None:
    head.INPUT.MIN_SIZE_TRAIN = (32 * scale,)
    found = build_mapper(head, is_train=True)(record)["instances"]
    wanted = torch.tensor([BOX, [6.0, 5.0, 8.0, 4.0, 0.0]])
    wanted[:, :4] *= scale
    assert torch.allclose(found.gt_boxes.tensor, wanted, atol=1e-4)
    assert found.gt_classes.tolist() == [0, 1]


def test_rotated_boxes_are_flipped(head: CfgNode, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    head.INPUT.RANDOM_FLIP = "horizontal"
    monkeypatch.setattr(np.random, "uniform", lambda *args: np.zeros(args[-1] if len(args) == 3 else ()))
    found = build_mapper(head, is_train=True)(record)["instances"].gt_boxes.tensor[0]
    assert torch.allclose(found, torch.tensor([48 - BOX[0], *BOX[1:4], -BOX[4]]), atol=1e-4)


def outline(values: list[float]) -> Polygon:
    x, y, width, height, angle = values
    upright = box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return affinity.rotate(upright, -angle)  # image coordinates point down


def overlaps(first: RotatedBoxes, second: RotatedBoxes) -> torch.Tensor:
    rows = [[outline(a), outline(b)] for a in first.tensor.tolist() for b in second.tensor.tolist()]
    return torch.tensor([a.intersection(b).area / a.union(b).area for a, b in rows]).view(len(first), len(second))


@pytest.mark.parametrize(("angle", "wanted"), [(30.0, 100.0), (120.0, 0.0)])
def test_rotated_boxes_are_evaluated(
    head: CfgNode, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, angle: float, wanted: float
) -> None:
    """Turned by a quarter, a box of 10 x 6 overlaps itself by less than a half."""
    monkeypatch.setattr(rotated_coco_evaluation, "pairwise_iou_rotated", overlaps)
    record["annotations"] = record["annotations"][:1]
    DatasetCatalog.register("rotated", lambda: [record])
    MetadataCatalog.get("rotated").set(thing_classes=["a"], evaluator_type="coco")
    try:
        evaluator = build_evaluator("rotated", output_dir=str(tmp_path), head=head)
        evaluator.reset()
        found = Instances((32, 48), pred_boxes=RotatedBoxes([[*BOX[:4], angle]]), scores=torch.ones(1))
        found.pred_classes = torch.zeros(1, dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
        assert main_metric(evaluator.evaluate()) == {"bbox/AP": pytest.approx(wanted)}
    finally:
        DatasetCatalog.pop("rotated")
        MetadataCatalog.pop("rotated")
