"""Images with labels of their own: read, augmented and cropped by timm's transforms."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps
from timm.data import create_transform

from ..labels import image_labels
from .files import orientation

Record = dict[str, Any]


class ClassificationMapper:
    """Read, augment and crop one labelled image.

    Args:
        image_format: "RGB" or "BGR", the channel order of the result.
        is_train: random resized crop, flip and colour jitter; else resize and centre crop.
        size: side of the square result in pixels.
        scale: share of the image's area that a training crop takes, at least and at most.
        hflip: probability of a horizontal flip in training.
        vflip: of a vertical one.
        color_jitter: strength of brightness, contrast and saturation changes in training.
        auto_augment: a timm policy instead of colour jitter; "" for none.
        crop_pct: ``size`` divided by the length that a test image's shorter side is resized to.
        multi_label: an image has any number of classes.
    """

    def __init__(
        self,
        *,
        image_format: str,
        is_train: bool,
        size: int = 224,
        scale: tuple[float, float] = (0.25, 1.0),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        auto_augment: str = "",
        crop_pct: float = 0.875,
        multi_label: bool = False,
    ):
        self.image_format = image_format
        self.multi_label = multi_label
        self.transform = create_transform(
            size,
            is_training=is_train,
            scale=scale,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment or None,
            crop_pct=crop_pct,
            interpolation="bilinear",
            normalize=False,
        )

    def __call__(self, record: Record) -> Record:
        """Add ``image``: uint8 tensor (3, size, size); with several labels, also ``category_ids``: list of ints."""
        with PathManager.open(record["file_name"], "rb") as stream, Image.open(stream) as file:
            # As Detectron2's reader turns it.
            upright = (ImageOps.exif_transpose(file) if orientation(file) != 1 else file).convert("RGB")
        width, height = upright.size
        image = self.transform(upright)
        if self.image_format == "BGR":
            image = image.flip(0)
        mapped = {key: value for key, value in record.items() if key != "annotations"}
        if self.multi_label:
            mapped["category_ids"] = image_labels(record)
        return {**mapped, "image": image.contiguous(), "height": height, "width": width}


def build_classification_mapper(head: CfgNode, *, is_train: bool) -> ClassificationMapper:
    """The mapper that a classifier's config asks for."""
    options = head.INPUT.CLASSIFICATION
    return ClassificationMapper(
        image_format=head.INPUT.FORMAT,
        is_train=is_train,
        size=options.SIZE,
        scale=tuple(options.SCALE),
        hflip=0.5 if head.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
        vflip=0.5 if head.INPUT.RANDOM_FLIP == "vertical" else 0.0,
        color_jitter=options.COLOR_JITTER,
        auto_augment=options.AUTO_AUGMENT,
        crop_pct=options.CROP_PCT,
        multi_label=head.MODEL.CLASSIFIER.MULTI_LABEL,
    )
