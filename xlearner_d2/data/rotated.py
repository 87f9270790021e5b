"""Rotated boxes, which Detectron2's mapper does not map: (centre x, centre y, width, height, degrees) each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from fvcore.transforms.transform import BlendTransform

Record = dict[str, Any]

# Detectron2 tells how a rotated box is resized and flipped, and not that changes of colour leave it where it is.
BlendTransform.register_type("rotated_box", lambda transform, boxes: boxes)


def has_rotated_boxes(head: CfgNode) -> bool:
    """Whether a head learns and predicts rotated boxes."""
    return head.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN" or head.MODEL.ROI_HEADS.NAME == "RROIHeads"


class RotatedMapper(DatasetMapper):
    """Detectron2's mapper for objects whose ``bbox_mode`` is ``XYWHA_ABS``; other boxes get the angle 0."""

    def _transform_annotations(self, dataset_dict: Record, transforms: Any, image_shape: tuple[int, int]) -> None:
        items = [item for item in dataset_dict.pop("annotations") if not item.get("iscrowd", 0)]
        found = []
        for item in items:
            box = _as_rotated(item["bbox"], item["bbox_mode"])
            box = transforms.apply_rotated_box(np.array([box], dtype=np.float64))[0]
            found.append({"bbox": box.tolist(), "category_id": item["category_id"]})
        instances = utils.annotations_to_instances_rotated(found, image_shape)
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def _as_rotated(box: Sequence[float], mode: BoxMode) -> list[float]:
    if mode == BoxMode.XYWHA_ABS:
        return list(box)
    return BoxMode.convert(BoxMode.convert(list(box), mode, BoxMode.XYWH_ABS), BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
