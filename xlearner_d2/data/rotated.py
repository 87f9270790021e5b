"""Rotated boxes, which Detectron2's mapper does not map: (centre x, centre y, width, height, degrees) each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from fvcore.transforms.transform import BlendTransform, CropTransform, VFlipTransform

Record = dict[str, Any]


def _flip_vertically(transform: VFlipTransform, boxes: np.ndarray) -> np.ndarray:
    boxes[:, 1], boxes[:, 4] = transform.height - boxes[:, 1], -boxes[:, 4]
    return boxes


def _crop(transform: CropTransform, boxes: np.ndarray) -> np.ndarray:
    boxes[:, :2] -= (transform.x0, transform.y0)
    return boxes


# Detectron2 tells how a rotated box is resized and flipped sideways; colours leave it where it is.
BlendTransform.register_type("rotated_box", lambda transform, boxes: boxes)
VFlipTransform.register_type("rotated_box", _flip_vertically)
CropTransform.register_type("rotated_box", _crop)


def has_rotated_boxes(head: CfgNode) -> bool:
    """Whether a head learns and predicts rotated boxes."""
    return head.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN" or head.MODEL.ROI_HEADS.NAME == "RROIHeads"


class RotatedMapper(DatasetMapper):
    """Detectron2's mapper for objects whose ``bbox_mode`` is ``XYWHA_ABS``; other boxes get the angle 0.

    An object whose centre a crop leaves out is left out.
    """

    def _transform_annotations(self, dataset_dict: Record, transforms: Any, image_shape: tuple[int, int]) -> None:
        items = [item for item in dataset_dict.pop("annotations") if not item.get("iscrowd", 0)]
        cropped = any(isinstance(transform, CropTransform) for transform in transforms.transforms)
        found = []
        for item in items:
            box = _as_rotated(item["bbox"], item["bbox_mode"])
            box = transforms.apply_rotated_box(np.array([box], dtype=np.float64))[0]
            if cropped and not (0 <= box[0] <= image_shape[1] and 0 <= box[1] <= image_shape[0]):
                continue
            found.append({"bbox": box.tolist(), "category_id": item["category_id"]})
        instances = utils.annotations_to_instances_rotated(found, image_shape)
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def _as_rotated(box: Sequence[float], mode: BoxMode) -> list[float]:
    box = [float(value) for value in box]  # of whole numbers, Detectron2 would make a centre that is one
    if mode == BoxMode.XYWHA_ABS:
        return box
    return BoxMode.convert(BoxMode.convert(box, mode, BoxMode.XYWH_ABS), BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
