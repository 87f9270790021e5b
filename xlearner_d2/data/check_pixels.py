"""Do the pixels of masks, panoptic and depth labels fit their record?"""

from typing import Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from pycocotools import mask as rle

from ..extensions import rgb2id
from .depth import read_depth

Record = dict[str, Any]
Finding = tuple[str, str]  # kind and text of a problem
_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


def check_masks(record: Record, size: tuple[int, int]) -> list[Finding]:
    """Problems of objects' masks; ``size`` is the image's width and height."""
    findings = []
    for number, item in enumerate(record.get("annotations", ()), 1):
        mask = item.get("segmentation")
        text = _judge_rle(mask, size) if isinstance(mask, dict) else _judge_polygons(mask, item) if mask else ""
        if text:
            findings.append(("wrong masks", f"{record['file_name']}: the mask of object {number} {text}."))
    return findings


def _judge_rle(mask: Record, size: tuple[int, int]) -> str:
    height, width = mask["size"]
    if (width, height) != size:
        return "is {} x {} pixels, but its image is {} x {}".format(width, height, *size)
    try:
        rle.decode(mask)
    except (ValueError, TypeError) as error:
        return f"is no RLE: {error}"
    return ""


def _judge_polygons(polygons: list[list[float]], item: Record) -> str:
    """Polygons that are of another size of the image than the box are seldom where it is."""
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])  # (N, 2)
    box = np.reshape(BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS), (2, 2))
    if (points.max(0) < box[0] - 1).any() or (points.min(0) > box[1] + 1).any():
        got = f"from {points.min(0).round(2).tolist()} to {points.max(0).round(2).tolist()}"
        return f"lies {got}, but its box from {box[0].tolist()} to {box[1].tolist()}"
    return ""


def check_segments(record: Record, size: tuple[int, int]) -> list[Finding]:
    """Problems of a panoptic PNG; ``size`` is the image's width and height."""
    file = str(record["pan_seg_file_name"])
    try:
        ids = rgb2id(utils.read_image(file, "RGB"))
    except _READ_ERRORS as error:
        return [("damaged labels", f"{file} cannot be decoded as an image: {error}.")]
    findings = _check_size(file, ids, size)
    listed = [segment["id"] for segment in record["segments_info"]]
    found = set(np.unique(ids).tolist()) - {0}
    if found != set(listed) or len(set(listed)) != len(listed):
        only_png, only_json = sorted(found - set(listed))[:5], sorted(set(listed) - found)[:5]
        text = f"has segments {only_png} that are not listed, and lacks the listed {only_json}"
        text = text if only_png or only_json else f"has a segment that is listed twice: {sorted(listed)}"
        findings.append(("segments that do not agree", f"{file} {text}; each once in both is expected."))
    return findings


def check_depth(record: Record, size: tuple[int, int]) -> list[Finding]:
    """Problems of a depth map; ``size`` is the image's width and height."""
    file = str(record["depth_file_name"])
    try:
        depth = read_depth(file, scale=record["depth_scale"])
    except _READ_ERRORS as error:
        return [("damaged depth maps", f"{file} cannot be read: {error}.")]
    findings = _check_size(file, depth, size)
    if not depth.any():
        findings.append(("empty depth maps", f"{file} has no positive value, but some known depth is expected."))
    return findings


def _check_size(file: str, labels: np.ndarray, size: tuple[int, int]) -> list[Finding]:
    height, width = labels.shape
    if (width, height) == size:
        return []
    text = "{} is {} x {} pixels, but its image is {} x {}.".format(file, width, height, *size)
    return [("labels of a wrong size", text)]
