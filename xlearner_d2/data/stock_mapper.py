"""Detectron2's own mapper, with the colour changes that it has no setting for."""

from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..specs import ConfigError

#: A mapper that keeps what it applies to an image in ``augmentations``, as Detectron2's do.
AnyMapper = TypeVar("AnyMapper", bound=Any)


def build_stock_mapper(head: CfgNode, *, is_train: bool, kind: type[DatasetMapper] = DatasetMapper) -> DatasetMapper:
    """The mapper that Detectron2 would use, or another kind of it, with ``INPUT.COLOR_JITTER`` in training."""
    mapper = kind(head, is_train=is_train)
    return with_color_jitter(mapper, head.INPUT.COLOR_JITTER) if is_train else mapper


def with_color_jitter(mapper: AnyMapper, strength: float) -> AnyMapper:
    """Add changes of brightness, contrast and saturation to what a mapper does already.

    Args:
        mapper: changed in place, and returned.
        strength: each factor is drawn from 1 - strength to 1 + strength; 0 adds nothing.

    Raises:
        ConfigError: when it is negative.
    """
    if not 0 <= strength < float("inf"):
        raise ConfigError([f"INPUT.COLOR_JITTER is {strength}, but a finite number of at least 0 is expected."])
    if strength:
        least, most = max(0.0, 1 - strength), 1 + strength
        changes = [kind(least, most) for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)]
        mapper.augmentations = T.AugmentationList([*mapper.augmentations.augs, *changes])
    return mapper
