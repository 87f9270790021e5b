"""The sources' data: registered, read once, and checked as a whole before anything is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations

from ..specs import ConfigError, SourceSpec, nearest, parse_datasets
from .builtin import dataset_root, register_datasets
from .check import check_records, check_same_classes

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class SourceData:
    """What one source learns from and is tested on.

    Attributes:
        train: training records; images without any annotation are left out, as Detectron2 does.
        test: records of each test data set, by its name.
    """

    train: Records
    test: Mapping[str, Records]


def register_sources(cfg: CfgNode, sources: Sequence[SourceSpec]) -> None:
    """Register ``XLEARNER.DATASETS`` and see that every data set the sources name is known.

    Raises:
        ConfigError: with all problems, each unknown name with its nearest known one.
    """
    problems: list[str] = []
    specs = parse_datasets(cfg.XLEARNER.DATASETS, problems)
    try:
        register_datasets(specs, dataset_root())
    except ConfigError as error:
        problems += error.problems
    known = DatasetCatalog.list()
    for source in sources:
        for key, names in (("TRAIN", source.train), ("TEST", source.test)):
            problems += [
                f"XLEARNER.SOURCES.{source.name}.{key} names the unknown data set {name!r}.{nearest(name, known)}"
                for name in names
                if name not in known
            ]
    if problems:
        raise ConfigError(problems)


def load_sources(sources: Sequence[SourceSpec], *, check_images: int) -> dict[str, SourceData]:
    """Read and check the records of all sources.

    Args:
        check_images: images per data set that are decoded; -1 for all.

    Raises:
        ConfigError: with every problem found in any data set.
    """
    problems: list[str] = []
    names = dict.fromkeys(name for source in sources for name in (*source.train, *source.test))
    records: dict[str, Records] = {}
    for name in names:
        users = ", ".join(source.name for source in sources if name in (*source.train, *source.test))
        try:
            records[name] = DatasetCatalog.get(name)
        except (ValueError, OSError, KeyError, AssertionError) as error:
            found = error.problems if isinstance(error, ConfigError) else [f"data set {name!r}: {error}"]
        else:
            found = check_records(name, records[name], MetadataCatalog.get(name), max_images=check_images)
        problems += [f"source {users}: {problem}" for problem in found]
    if not problems:
        for source in sources:
            found = check_same_classes((*source.train, *source.test))
            problems += [f"XLEARNER.SOURCES.{source.name}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems, what="The data")
    return {
        source.name: SourceData(
            train=_usable([record for name in source.train for record in records[name]], source),
            test={name: records[name] for name in source.test},
        )
        for source in sources
    }


def _usable(records: Records, source: SourceSpec) -> Records:
    if not records or "annotations" not in records[0]:
        return records
    kept = filter_images_with_only_crowd_annotations(records)
    if not kept:
        message = f"XLEARNER.SOURCES.{source.name}.TRAIN {list(source.train)}: no image has an annotation."
        raise ConfigError([message], what="The data")
    return kept
