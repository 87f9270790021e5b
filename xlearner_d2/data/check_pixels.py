"""Do the pixels of masks and of semantic, panoptic and depth labels fit their record?"""

import logging
import struct
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle

from ..extensions import rgb2id
from .depth import read_depth
from .files import shown
from .polygons import no_polygon
from .problems import Problems

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Finding = tuple[str, str]  # kind and text of a problem
_UNLABELLED_KIND = "label images without a label"
_SEEN_KIND = "classes that occur in label images"
_FAR_KIND = "depths that are all near or far"
#: What a depth head learns from by default, in metres (MODEL.DEPTH_HEAD.RANGE).
_NEAR, _FAR = 0.1, 100.0
#: What Pillow's decoders raise for damaged files, depending on the format.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


def words(error: BaseException) -> str:
    """What a decoder says, without the dot at its end."""
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory
        return "it is in no known image format"
    return str(error).rstrip(".") or type(error).__name__


def check_label(file: str, size: tuple[int, int], metadata: Metadata) -> list[Finding]:
    """Problems of a label PNG; ``size`` is the image's width and height."""
    try:
        with PathManager.open(file, "rb") as stream, Image.open(stream) as image:
            image.load()
    except DECODE_ERRORS as error:
        return [("damaged labels", f"{shown(file)} cannot be read as a label image: {words(error)}.")]
    file = shown(file)
    if image.mode != "L":
        # Detectron2 would turn colours, also those of a palette, into shades of grey, and clip 16-bit values.
        text = f"{file} has the mode {image.mode}, but class indices in one 8-bit channel (mode L) are expected."
        return [("labels of a wrong mode", text)]
    findings = []
    if image.size != size:
        text = "{} is {} x {} pixels, but its image is {} x {}.".format(file, *image.size, *size)
        findings.append(("labels of a wrong size", text))
    num_classes, ignored = len(metadata.get("stuff_classes", ())), metadata.get("ignore_label", 255)
    counts = image.histogram()
    if {value for value, count in enumerate(counts) if count} == {ignored}:
        findings.append((_UNLABELLED_KIND, f"{file} has the label {ignored} alone, which is ignored."))
    findings += [(_SEEN_KIND, str(value)) for value in range(num_classes) if counts[value] and value != ignored]
    wrong = [value for value in range(num_classes, len(counts)) if counts[value] and value != ignored]
    if wrong:
        got = ", ".join(f"{value} ({counts[value]} pixels)" for value in wrong[:5])
        expected = f"0 to {num_classes - 1}, or {ignored} to ignore, is expected"
        text = f"{file} has the label {got}, but {expected if num_classes else 'the metadata has no stuff_classes'}."
        if wrong == [num_classes]:
            text += " If classes are counted from 1 and label 0 is none of them, set REDUCE_ZERO_LABEL: True."
        findings.append(("labels of unknown classes", text))
    return findings


def tell_unlabelled(problems: Problems, decoded: int) -> None:
    """Label images in which every pixel is ignored are no error, as crops of others are such, but of no use."""
    if found := problems.pop(_UNLABELLED_KIND):
        text = "%s: nothing is learned from %d of the %d label images that were decoded: %s"
        logger.warning(text, problems.subject, len(found), decoded, found[0])


def tell_far(problems: Problems, decoded: int) -> None:
    """Depths that are all near or far are no error, as of a microscope, but a head leaves them out as it is set."""
    if found := problems.pop(_FAR_KIND):
        text = (
            "%s: %d of the %d depth maps that were decoded have no depth from %g to %g m, such as %s. Is SCALE right?"
        )
        logger.warning(text, problems.subject, len(found), decoded, _NEAR, _FAR, found[0])


def tell_unseen(problems: Problems, metadata: Metadata) -> None:
    """Classes without a pixel are no error, as a small set may lack some, but often labels that are not as meant."""
    seen = set(problems.pop(_SEEN_KIND))
    names = metadata.get("stuff_classes", ())
    unseen = [name for index, name in enumerate(names) if str(index) not in seen]
    if seen and unseen:
        few = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        cure = "" if len(seen) > 1 else " Masks of 0 and 255 need 1 instead of 255, which is ignored."
        text = "%s: %d of %d classes have no pixel in the label images that were decoded: %s.%s"
        logger.warning(text, problems.subject, len(unseen), len(names), few, cure)


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
    if wrong := no_polygon(polygons):
        return wrong
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
    except DECODE_ERRORS as error:
        return [("damaged labels", f"{file} cannot be decoded as an image: {words(error)}.")]
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
    except DECODE_ERRORS as error:
        return [("damaged depth maps", f"{file} cannot be read: {words(error)}.")]
    findings = _check_size(file, depth, size)
    known = depth[depth > 0]
    if not known.size:
        findings.append(("empty depth maps", f"{file} has no positive value, but some known depth is expected."))
    elif known.max() < _NEAR or known.min() > _FAR:
        findings.append((_FAR_KIND, f"{file} with {known.min():.3g} to {known.max():.3g} m"))
    return findings


def _check_size(file: str, labels: np.ndarray, size: tuple[int, int]) -> list[Finding]:
    height, width = labels.shape
    if (width, height) == size:
        return []
    text = "{} is {} x {} pixels, but its image is {} x {}.".format(file, width, height, *size)
    return [("labels of a wrong size", text)]
