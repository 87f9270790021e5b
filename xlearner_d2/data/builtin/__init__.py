"""Data sets on disk, registered with Detectron2's catalogs; called explicitly, never at import.

One module per format, each with ``register(spec, root)``; ``datasets/README.md`` shows the layouts.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...specs import ConfigError, DatasetSpec, nearest
from . import coco, depth, image_folder, image_list, lvis, panoptic, semantic, torchvision_sets, voc, webdataset_shards

__all__ = ["dataset_root", "register_datasets"]

_FORMATS: Mapping[str, Callable[[DatasetSpec, Path], None]] = {
    "coco": coco.register,
    "coco_panoptic": panoptic.register,
    "lvis": lvis.register,
    "voc": voc.register,
    "sem_seg": semantic.register,
    "image_folder": image_folder.register,
    "image_list": image_list.register,
    "webdataset": webdataset_shards.register,
    "depth": depth.register,
    "torchvision": torchvision_sets.register,
}

#: Names registered here, which may be registered again; those of Detectron2 or of the user may not.
_OURS: set[str] = set()


def dataset_root() -> Path:
    """Where relative paths of data sets start: ``$DETECTRON2_DATASETS``, else ``datasets``, as in Detectron2."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def register_datasets(specs: Sequence[DatasetSpec], root: Path) -> None:
    """Register data sets in ``DatasetCatalog`` and ``MetadataCatalog``.

    Class names are in the metadata from then on. Images and the annotations of single images are read when the
    data set is asked for; a COCO json is also validated here. A data set registered by an earlier call is replaced.

    Args:
        specs: the data sets.
        root: where their relative paths start.

    Raises:
        ConfigError: with the problems of all data sets; those without a problem are registered.
    """
    problems: list[str] = []
    seen: set[str] = set()
    for spec in specs:
        try:
            _check_name(spec, seen)
            _FORMATS[spec.format](spec, root)
            MetadataCatalog.get(spec.name).set(license=spec.license)
            _OURS.add(spec.name)
        except ConfigError as error:
            problems += error.problems
        seen.add(spec.name)
    if problems:
        raise ConfigError(problems, what="The data")


def _check_name(spec: DatasetSpec, seen: set[str]) -> None:
    where = f"data set {spec.name!r}"
    if spec.name in seen:
        raise ConfigError([f"{where} is given twice, but one record per name is expected."])
    if spec.name in DatasetCatalog and spec.name not in _OURS:
        message = f"{where}: Detectron2 or another package registered this name already; choose another one."
        raise ConfigError([message])
    if spec.format not in _FORMATS:
        raise ConfigError([f"{where}: there is no FORMAT {spec.format!r}.{nearest(spec.format, _FORMATS)}"])
