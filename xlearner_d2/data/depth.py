"""Depth maps: read, augmented together with their image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image

from .stock_mapper import build_stock_mapper

Record = dict[str, Any]


def read_depth(file: str, *, scale: float) -> np.ndarray:
    """A depth map in metres: float32 (H, W), 0 where it is not known.

    Args:
        file: a PNG of one channel of 8 or 16 bits, or a numpy array (H, W) in ``.npy``.
        scale: what a metre is in the file: 1000 for millimetres.

    Raises:
        ValueError: for another shape or kind of numbers.
    """
    with PathManager.open(file, "rb") as stream:
        if file.endswith(".npy"):
            values = np.load(stream, allow_pickle=False)
        else:
            with Image.open(stream) as image:
                values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "uif":
        got = f"shape {values.shape} of {values.dtype}"
        raise ValueError(f"{file} has {got}, but one number per pixel (H, W) is expected.")
    depth = values.astype(np.float32) / np.float32(scale)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


class DepthMapper:
    """Read an image and its depth, and augment both; depth is moved as labels are, its values are left as they are.

    Args:
        augmentations: geometric and colour changes, as Detectron2 has them.
        image_format: channel order of the image.
    """

    def __init__(self, *, augmentations: Sequence[Any], image_format: str):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    def __call__(self, record: Record) -> Record:
        """Add ``image`` (3, H, W) uint8 and ``depth`` (H, W) float32 in metres, 0 where it is not known."""
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        given = T.AugInput(image, sem_seg=read_depth(record["depth_file_name"], scale=record["depth_scale"]))
        self.augmentations(given)
        return {
            **record,
            "height": record.get("height", image.shape[0]),
            "width": record.get("width", image.shape[1]),
            "image": torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1))),
            "depth": torch.as_tensor(np.ascontiguousarray(given.sem_seg)),
        }


def build_depth_mapper(head: CfgNode, *, is_train: bool) -> DatasetMapper | DepthMapper:
    """In training, image and depth with the augmentation that Detectron2's mapper would use; else the image alone."""
    stock = build_stock_mapper(head, is_train=is_train)
    if not is_train:
        return stock
    return DepthMapper(augmentations=stock.augmentations.augs, image_format=head.INPUT.FORMAT)
