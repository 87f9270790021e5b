"""INPUT.COLOR_JITTER: in training, and of colours alone."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from xlearner_d2 import add_xlearner_config
from xlearner_d2.data.mappers import build_mapper
from xlearner_d2.data.sources import source_data
from xlearner_d2.specs import ConfigError, SourceSpec

GREY, SIDE = 120, 16


def head(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_xlearner_config(cfg)
    sizes = ["INPUT.MIN_SIZE_TRAIN", [2 * SIDE], "INPUT.MIN_SIZE_TEST", 2 * SIDE, "INPUT.RANDOM_FLIP", "none"]
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *sizes, *opts])
    return cfg


ROTATED = ["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"]
DEPTH = ["MODEL.META_ARCHITECTURE", "DepthEstimator"]


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    image = np.full((SIDE, SIDE, 3), GREY, np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    np.save(tmp_path / "depth.npy", np.ones((SIDE, SIDE), np.float32))
    box = {"bbox": [2, 3, 4, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    depth = {"depth_file_name": str(tmp_path / "depth.npy"), "depth_scale": 1.0}
    return {"file_name": str(tmp_path / "image.png"), "width": SIDE, "height": SIDE, "annotations": [box], **depth}


@pytest.mark.parametrize("opts", [[], ROTATED, DEPTH], ids=["boxes", "rotated", "depth"])
def test_a_grey_image_becomes_another_grey_within_the_strength(record: dict[str, Any], opts: list[Any]) -> None:
    np.random.seed(0)
    mapper = build_mapper(head("INPUT.COLOR_JITTER", 0.2, *opts), is_train=True)
    seen = [mapper(dict(record))["image"].float() for _ in range(20)]
    levels = [float(image.mean()) for image in seen]
    # Contrast and saturation leave a grey image as it is, but for rounding.
    assert all(image.shape[1:] == (2 * SIDE, 2 * SIDE) and image.max() - image.min() <= 1 for image in seen)
    assert min(levels) >= 0.8 * GREY - 2
    assert max(levels) <= 1.2 * GREY + 2
    assert max(levels) - min(levels) > 0.1 * GREY


@pytest.mark.parametrize("opts", [[], ROTATED, DEPTH], ids=["boxes", "rotated", "depth"])
def test_an_image_is_changed_alike_in_either_order_of_channels(record: dict[str, Any], opts: list[Any]) -> None:
    Image.fromarray(np.full((SIDE, SIDE, 3), (200, 40, 90), np.uint8)).save(record["file_name"])
    found = []
    for order in ("BGR", "RGB"):
        mapper = build_mapper(head("INPUT.COLOR_JITTER", 0.4, "INPUT.FORMAT", order, *opts), is_train=True)
        np.random.seed(0)
        found.append([mapper(dict(record))["image"].int() for _ in range(5)])
    for bgr, rgb in zip(*found, strict=True):
        assert (bgr.flip(0) - rgb).abs().max() <= 1, "rounding apart"


@pytest.mark.parametrize("opts", [[], ROTATED, DEPTH], ids=["boxes", "rotated", "depth"])
def test_test_images_keep_their_colours(record: dict[str, Any], opts: list[Any]) -> None:
    mapper = build_mapper(head("INPUT.COLOR_JITTER", 0.5, *opts), is_train=False)
    assert (mapper(dict(record))["image"] == GREY).all()


def test_without_it_training_images_keep_their_colours(record: dict[str, Any]) -> None:
    assert (build_mapper(head(), is_train=True)(dict(record))["image"] == GREY).all()


@pytest.mark.parametrize("strength", [-0.1, float("nan")])
def test_wrong_strength(strength: float) -> None:
    with pytest.raises(ConfigError, match=rf"INPUT\.COLOR_JITTER is {strength}, but a finite number of at least 0"):
        build_mapper(head("INPUT.COLOR_JITTER", strength), is_train=True)


def test_boxes_are_as_without_it(record: dict[str, Any]) -> None:
    plain, changed = (
        build_mapper(head("INPUT.COLOR_JITTER", strength), is_train=True)(dict(record))["instances"]
        for strength in (0.0, 0.4)
    )
    assert plain.gt_boxes.tensor.tolist() == changed.gt_boxes.tensor.tolist()


@pytest.mark.parametrize("opts", [[], ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.8, 0.8]], ROTATED], ids=str)
def test_boxes_are_mapped_alike_from_records_without_the_masks_that_no_head_reads(
    record: dict[str, Any], opts: list[Any]
) -> None:
    (box,) = record["annotations"]
    record["annotations"] = [{**box, "segmentation": [[2, 3, 6, 3, 6, 8]], "iscrowd": 0}]
    spec = SourceSpec(name="boxes", task="detection", config="any.yaml", train=("birds",))

    def trained_on(*more: Any) -> dict[str, Any]:
        (found,) = source_data(spec, head(*opts, *more), {"birds": [record]}, seed=0).train
        return found

    assert trained_on("MODEL.MASK_ON", True) == record
    assert trained_on("INPUT.MAPPER", "a.Mapper") == record
    bare = trained_on()
    assert bare["annotations"] == [{**box, "iscrowd": 0}]
    assert record["annotations"][0]["segmentation"], "other sources may share the record"
    mapper = build_mapper(head(*opts), is_train=True)
    for seed in range(5):
        np.random.seed(seed)
        whole = mapper(copy.deepcopy(record))
        np.random.seed(seed)
        own = mapper(copy.deepcopy(bare))
        assert torch.equal(own["image"], whole["image"])
        assert str(own["instances"]) == str(whole["instances"])
