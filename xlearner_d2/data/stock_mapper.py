"""Detectron2's own mapper, with the colour changes that it has no setting for."""

from typing import Any, TypeVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from ..specs import ConfigError

#: A mapper that keeps what it applies to an image in ``augmentations``, as Detectron2's do.
AnyMapper = TypeVar("AnyMapper", bound=Any)


class BgrSaturation(T.RandomSaturation):
    """Detectron2's change of saturation, which weighs the channels as those of RGB images, for BGR ones."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """The change for one image, (height, width, 3)."""
        return super().get_transform(image[:, :, ::-1])


def build_stock_mapper(head: CfgNode, *, is_train: bool, kind: type[DatasetMapper] = DatasetMapper) -> DatasetMapper:
    """The mapper that Detectron2 would use, or another kind of it, with ``INPUT.COLOR_JITTER`` in training."""
    mapper = kind(head, is_train=is_train)
    return with_color_jitter(mapper, head) if is_train else mapper


def with_color_jitter(mapper: AnyMapper, head: CfgNode) -> AnyMapper:
    """Add changes of brightness, contrast and saturation to what a mapper does already.

    Args:
        mapper: changed in place, and returned.
        head: each factor is drawn from 1 - ``INPUT.COLOR_JITTER`` to 1 + it; 0 adds nothing.

    Raises:
        ConfigError: when it is negative.
    """
    strength = head.INPUT.COLOR_JITTER
    if not 0 <= strength < float("inf"):
        raise ConfigError([f"INPUT.COLOR_JITTER is {strength}, but a finite number of at least 0 is expected."])
    if strength:
        saturation = BgrSaturation if head.INPUT.FORMAT == "BGR" else T.RandomSaturation
        least, most = max(0.0, 1 - strength), 1 + strength
        changes = [kind(least, most) for kind in (T.RandomBrightness, T.RandomContrast, saturation)]
        mapper.augmentations = T.AugmentationList([*mapper.augmentations.augs, *changes])
    return mapper
