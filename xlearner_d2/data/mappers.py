"""From a data set record to what a head takes: one mapper per kind of supervision, each stamping its source.

Boxes, masks, keypoints, semantic and panoptic labels are mapped by Detectron2's own ``DatasetMapper``; images with a
label by timm's transforms.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps
from timm.data import create_transform

from . import files as files  # images in tar files and labels with a palette are then paths that can be opened

Record = dict[str, Any]


class ClassificationMapper:
    """Read, augment and crop one labelled image.

    Args:
        image_format: "RGB" or "BGR", the channel order of the result.
        is_train: random resized crop, flip and colour jitter; else resize and centre crop.
        size: side of the square result in pixels.
        scale: share of the image's area that a training crop takes, at least and at most.
        hflip: probability of a horizontal flip in training.
        color_jitter: strength of brightness, contrast and saturation changes in training.
        auto_augment: a timm policy instead of colour jitter; "" for none.
        crop_pct: ``size`` divided by the length that a test image's shorter side is resized to.
    """

    def __init__(
        self,
        *,
        image_format: str,
        is_train: bool,
        size: int = 224,
        scale: tuple[float, float] = (0.25, 1.0),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str = "",
        crop_pct: float = 0.875,
    ):
        self.image_format = image_format
        self.transform = create_transform(
            size,
            is_training=is_train,
            scale=scale,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment or None,
            crop_pct=crop_pct,
            interpolation="bilinear",
            normalize=False,
        )

    def __call__(self, record: Record) -> Record:
        """Add ``image``: uint8 tensor (3, size, size)."""
        with PathManager.open(record["file_name"], "rb") as stream, Image.open(stream) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")  # as Detectron2's reader turns it
        width, height = upright.size
        image = self.transform(upright)
        if self.image_format == "BGR":
            image = image.flip(0)
        return {**record, "image": image.contiguous(), "height": height, "width": width}


def build_mapper(head: CfgNode, *, is_train: bool) -> Callable[[Record], Record]:
    """The mapper that the model of a head's config needs, with the augmentation that the config asks for."""
    if head.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return DatasetMapper(head, is_train=is_train)
    options = head.INPUT.CLASSIFICATION
    return ClassificationMapper(
        image_format=head.INPUT.FORMAT,
        is_train=is_train,
        size=options.SIZE,
        scale=tuple(options.SCALE),
        hflip=0.5 if head.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
        color_jitter=options.COLOR_JITTER,
        auto_augment=options.AUTO_AUGMENT,
        crop_pct=options.CROP_PCT,
    )


class SourceMapper:
    """Call a source's mapper with random state of its own, stamp the source, and name the file when it fails."""

    def __init__(self, source: str, mapper: Callable[[Record], Record]):
        self.source = source
        self.mapper = mapper

    def __call__(self, record: Record, seed: int) -> Record:
        """Map one record; the same seed gives the same augmentation in any process.

        Raises:
            RuntimeError: from the mapper's own error, naming source and file.
        """
        try:
            with _augmentation_seed(seed):
                return {**self.mapper(record), "source": self.source}
        except Exception as error:
            message = f"source {self.source!r} could not read {record.get('file_name')}: {error!r}"
            raise RuntimeError(message) from error


@contextmanager
def _augmentation_seed(seed: int) -> Iterator[None]:
    """Seed what augmentations draw from, and restore it: without loader workers, the model draws from it as well."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # Detectron2's augmentations
        torch.default_generator.manual_seed(seed)  # timm's; torch.manual_seed would format a stack trace for CUDA
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
