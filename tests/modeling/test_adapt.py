"""Semantic heads of Detectron2 and of its projects where no pixel has a label."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from xlearner_d2 import XLearner

NAMES = ["cat", "dog", "eel"]
IGNORED = 255
LIGHT = ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
BOXES = ["MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]
DEEPLAB = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 16]
POINTS = [
    *("MODEL.SEM_SEG_HEAD.NAME", "PointRendSemSegHead", "MODEL.POINT_HEAD.IN_FEATURES", ["p2"]),
    *("MODEL.POINT_HEAD.TRAIN_NUM_POINTS", 64, "MODEL.POINT_HEAD.FC_DIM", 16),
    *("MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME", "SemSegFPNHead"),
]
#: head -> config and options
HEADS: dict[str, tuple[str, list[Any]]] = {
    "semantic FPN": ("configs/heads/light_semantic_fpn.yaml", LIGHT),
    "panoptic FPN": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", [*LIGHT, *BOXES]),
    "DeepLab": ("configs/heads/deeplab_v3_plus.yaml", [*DEEPLAB, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy"]),
    "DeepLab of hard pixels": ("configs/heads/deeplab_v3_plus.yaml", DEEPLAB),
    "PointRend": ("configs/heads/light_semantic_fpn.yaml", [*LIGHT, *POINTS]),
}


@pytest.fixture
def make(tiny_cfg: CfgNode) -> Callable[[str], XLearner]:
    """A model with one of the heads."""
    MetadataCatalog.get("tiny_adapt").set(thing_classes=NAMES, stuff_classes=NAMES, ignore_label=IGNORED)

    def build(name: str) -> XLearner:
        config, opts = HEADS[name]
        record = {"TASK": "segmentation", "CONFIG": config, "TRAIN": ["tiny_adapt"], "OPTS": opts}
        tiny_cfg.XLEARNER.IMPORTS = ["detectron2.projects.deeplab", "detectron2.projects.point_rend"]
        tiny_cfg.XLEARNER.SOURCES = CfgNode({"one": CfgNode(record)}, new_allowed=True)
        torch.manual_seed(0)
        return build_model(tiny_cfg)

    return build


def losses_of(model: XLearner, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with EventStorage():
        return {name: loss for name, loss in model({"one": batch}).items() if "sem_seg" in name}


@pytest.mark.parametrize("name", HEADS)
def test_images_without_labels_have_no_loss_and_a_gradient_of_zeros(
    make: Callable[[str], XLearner], batch: list[dict[str, Any]], name: str
) -> None:
    model = make(name)
    losses = losses_of(model, [{**record, "sem_seg": torch.full_like(record["sem_seg"], IGNORED)} for record in batch])
    assert losses
    assert [loss.item() for loss in losses.values()] == [0.0] * len(losses)
    sum(losses.values(), start=torch.zeros(())).backward()
    head = dict(model.heads["one"].sem_seg_head.named_parameters())  # type: ignore[union-attr]
    assert [key for key, p in head.items() if p.grad is None] == []
    assert [key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()] == []


@pytest.mark.parametrize("name", HEADS)
def test_a_single_labelled_pixel_is_learned_from_as_ever(
    make: Callable[[str], XLearner], batch: list[dict[str, Any]], name: str
) -> None:
    for record in batch[1:]:
        record["sem_seg"].fill_(IGNORED)
    batch[0]["sem_seg"].view(-1)[1:] = IGNORED if name != "PointRend" else 0
    model = make(name)
    found = losses_of(model, batch)
    model.heads["one"].sem_seg_head._forward_hooks.clear()  # type: ignore[union-attr]
    expected = losses_of(model, batch)
    assert found.keys() == expected.keys()
    assert all(loss.item() == expected[key].item() > 0 for key, loss in found.items())
