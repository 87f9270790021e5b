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


def test_rotated_boxes_are_flipped_vertically(
    head: CfgNode, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    head.INPUT.RANDOM_FLIP = "vertical"
    monkeypatch.setattr(np.random, "uniform", lambda *args: np.zeros(args[-1] if len(args) == 3 else ()))
    found = build_mapper(head, is_train=True)(record)["instances"].gt_boxes.tensor[0]
    before, after = (outline(values) for values in (BOX, found.tolist()))
    assert after.symmetric_difference(affinity.scale(before, yfact=-1, origin=(0, 16))).area < 1e-3


def test_rotated_boxes_are_cropped_with_their_image(
    head: CfgNode, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    head.INPUT.CROP.ENABLED, head.INPUT.CROP.TYPE, head.INPUT.CROP.SIZE = True, "absolute", [24, 24]
    head.INPUT.MIN_SIZE_TRAIN = (24,)
    monkeypatch.setattr(np.random, "randint", lambda low, high=None: 4 if low == 9 else 10)  # 32 - 24 + 1 rows
    found = build_mapper(head, is_train=True)(record)["instances"]
    assert torch.allclose(found.gt_boxes.tensor, torch.tensor([[BOX[0] - 10, BOX[1] - 4, *BOX[2:]]]), atol=1e-4)
    assert found.gt_classes.tolist() == [0], "the centre of the other is outside"


def test_without_a_crop_a_centre_may_be_outside(head: CfgNode, record: dict[str, Any]) -> None:
    record["annotations"] = [{**record["annotations"][0], "bbox": [-2.0, *BOX[1:]]}]
    assert len(build_mapper(head, is_train=True)(record)["instances"]) == 1


def test_upright_boxes_of_whole_numbers_keep_their_centre(head: CfgNode, record: dict[str, Any]) -> None:
    record["annotations"] = [{"bbox": [10, 10, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    found = build_mapper(head, is_train=True)(record)["instances"].gt_boxes.tensor
    assert found.tolist() == [[12.5, 12.5, 5, 5, 0]]


def outline(values: list[float]) -> Polygon:
    x, y, width, height, angle = values
    upright = box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return affinity.rotate(upright, -angle)  # image coordinates point down


def overlaps(first: RotatedBoxes, second: RotatedBoxes) -> torch.Tensor:
    rows = [[outline(a), outline(b)] for a in first.tensor.tolist() for b in second.tensor.tolist()]
    return torch.tensor([a.intersection(b).area / a.union(b).area for a, b in rows]).view(len(first), len(second))


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize(("angle", "wanted"), [(30.0, 100.0), (120.0, 0.0), (None, 0.0)])
def test_rotated_boxes_are_evaluated(
    head: CfgNode,
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    angle: float | None,
    wanted: float,
    crowd: bool,
) -> None:
    """Turned by a quarter, a box of 10 x 6 overlaps itself by less than a half; no box at all is AP 0."""
    monkeypatch.setattr(rotated_coco_evaluation, "pairwise_iou_rotated", overlaps)
    far = {**record["annotations"][2], "bbox": [40.0, 25.0, 8.0, 4.0, 10.0]}
    record["annotations"] = [record["annotations"][0], *([far] if crowd else [])]
    DatasetCatalog.register("rotated", lambda: [record])
    MetadataCatalog.get("rotated").set(thing_classes=["a"], evaluator_type="coco")
    try:
        evaluator = build_evaluator("rotated", output_dir=str(tmp_path), head=head)
        evaluator.reset()
        boxes = RotatedBoxes([[*BOX[:4], angle or 0.0]])
        found = Instances((32, 48), pred_boxes=boxes, scores=torch.ones(1), pred_classes=torch.zeros(1).long())
        capsys.readouterr()
        evaluator.process([record], [{"instances": found if angle else found[:0]}])
        assert main_metric(evaluator.evaluate()) == {"bbox/AP": pytest.approx(wanted)}
        assert capsys.readouterr().out == ""
    finally:
        DatasetCatalog.pop("rotated")
        MetadataCatalog.pop("rotated")
