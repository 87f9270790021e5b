"""From a data set record to what a head takes: one mapper per kind of supervision, each stamping its source.

Boxes, masks, keypoints and semantic labels are mapped by Detectron2's own ``DatasetMapper``; the other kinds are in
``MAPPERS``, by the meta-architecture that learns from them.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.registry import locate
from torch.utils.data import get_worker_info

from ..specs import ConfigError
from . import files as files  # images in tar files and labels with a palette are then paths that can be opened
from .classification import build_classification_mapper
from .depth import build_depth_mapper
from .panoptic import build_panoptic_deeplab_mapper, build_panoptic_mapper
from .rotated import RotatedMapper, has_rotated_boxes
from .stock_mapper import build_stock_mapper

Record = dict[str, Any]
#: Records that are tried until a mapper takes one.
_TRIES = 100
#: Gives a record, or None to leave it out.
Mapper = Callable[[Record], Any]


class MapperBuilder(Protocol):
    """Makes a mapper from a head's config."""

    def __call__(self, head: CfgNode, *, is_train: bool) -> Mapper: ...


#: Meta-architecture -> what maps its records; Detectron2's DatasetMapper maps those of all others.
MAPPERS: Mapping[str, MapperBuilder] = {
    "ImageClassifier": build_classification_mapper,
    "PanopticFPN": build_panoptic_mapper,
    "PanopticDeepLab": build_panoptic_deeplab_mapper,
    "DepthEstimator": build_depth_mapper,
}


def build_mapper(head: CfgNode, *, is_train: bool) -> Mapper:
    """The mapper that the model of a head's config needs, with the augmentation that the config asks for.

    Raises:
        ConfigError: when ``INPUT.MAPPER`` names nothing that can be called with the config.
    """
    if is_train and head.INPUT.MAPPER:
        return _third_party_mapper(head)
    build = MAPPERS.get(head.MODEL.META_ARCHITECTURE, _detectron2_mapper)
    return build(head, is_train=is_train)


def _detectron2_mapper(head: CfgNode, *, is_train: bool) -> Mapper:
    kind = RotatedMapper if has_rotated_boxes(head) else DatasetMapper
    return build_stock_mapper(head, is_train=is_train, kind=kind)


def _third_party_mapper(head: CfgNode) -> Mapper:
    """``INPUT.MAPPER``, called as the training scripts of Detectron2's projects call theirs."""
    name = head.INPUT.MAPPER
    try:
        mapper = locate(name)
        parameters = inspect.signature(getattr(mapper, "from_config", mapper)).parameters
        return mapper(head, is_train=True) if "is_train" in parameters else mapper(head)
    except Exception as error:  # whatever a third party's mapper raises
        wish = "a mapper such as my_project.MyDatasetMapper, called with the head's config, is expected"
        raise ConfigError([f"INPUT.MAPPER is {name!r}, but {wish}: {error!r}"]) from error


class SourceMapper:
    """Call a source's mapper with random state of its own, stamp the source, and name the file when it fails."""

    def __init__(self, source: str, mapper: Mapper):
        self.source = source
        self.mapper = mapper

    def __call__(self, record: Record, seed: int) -> Record | None:
        """Map one record; the same seed gives the same augmentation in any process.

        Returns:
            None where the mapper leaves the record out, as those of third parties may.

        Raises:
            RuntimeError: from the mapper's own error, naming source and file.
        """
        try:
            with _augmentation_seed(seed):
                mapped = self.mapper(record)
                return None if mapped is None else {**mapped, "source": self.source}
        except Exception as error:
            file = files.shown(str(record.get("file_name")))
            message = f"source {self.source!r} could not read {file}: {error!r}"
            raise RuntimeError(message) from error


def map_one(mapper: SourceMapper, records: Sequence[Record], index: int, *, seed: int) -> Record:
    """Map a record or, if its mapper leaves that out, others that the seed draws until one is taken.

    Raises:
        RuntimeError: when many are left out one after another, or see :class:`SourceMapper`.
    """
    others = np.random.default_rng((seed, index))
    chosen = index
    for _ in range(_TRIES):
        if (mapped := mapper(records[chosen], seed)) is not None:
            return mapped
        chosen = int(others.integers(len(records)))
    file = files.shown(str(records[index].get("file_name")))
    tried = f"its mapper left out {file} and {_TRIES - 1} other images one after another"
    raise RuntimeError(f"source {mapper.source!r}: {tried}.")


@contextmanager
def _augmentation_seed(seed: int) -> Iterator[None]:
    """Seed what augmentations draw from; where the model draws from it as well, restore it afterwards."""
    with _restored_random_state() if get_worker_info() is None else nullcontext():
        random.seed(seed)
        np.random.seed(seed)  # Detectron2's augmentations
        torch.default_generator.manual_seed(seed)  # timm's; torch.manual_seed would format a stack trace for CUDA
        yield


@contextmanager
def _restored_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
