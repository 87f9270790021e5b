"""The sources' data: registered, read once, and checked as a whole before anything is built."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.build import filter_images_with_few_keypoints, filter_images_with_only_crowd_annotations
from detectron2.utils.logger import log_first_n

from ..specs import ConfigError, ProbeSpec, SourceSpec, nearest, parse_datasets
from .builtin import dataset_root, register_datasets
from .check import check_records, check_same_classes
from .files import shown
from .proposals import proposal_files, with_proposals
from .subset import share_of_records

Records = list[dict[str, Any]]
#: Setting of a head that learns something of every object -> where an object has it, in words, and a cure.
_LEARNED = {
    "MASK_ON": ("segmentation", "mask", "add it"),
    "KEYPOINT_ON": ("keypoints", "keypoints", "add them, as zeros where they are not known"),
}


@dataclass(frozen=True)
class SourceData:
    """What one source learns from and is tested on.

    Attributes:
        train: training records; images without what the head learns from are left out, as Detectron2 does. Serialised,
            as Detectron2's loader has them: in less memory, which processes that read share rather than copy.
        test: records of each test data set, by its name.
    """

    train: Sequence[dict[str, Any]]
    test: Mapping[str, Records]


def register_sources(cfg: CfgNode, sources: Sequence[SourceSpec], probes: Sequence[ProbeSpec]) -> None:
    """Register the ``XLEARNER.DATASETS`` that sources and probes name, and see that all that they name are known.

    Others need not be there, as a list that several configs share may have more than one machine holds.

    Raises:
        ConfigError: with all problems, each unknown name with its nearest known one.
    """
    problems: list[str] = []
    specs = parse_datasets(cfg.XLEARNER.DATASETS, problems)
    wanted = [(f"SOURCES.{s.name}.TRAIN", name) for s in sources for name in s.train]
    wanted += [(f"SOURCES.{s.name}.TEST", name) for s in sources for name in s.test]
    wanted += [(f"PROBES.{p.name}", name) for p in probes for name in (p.train, p.test)]
    used = {name for _, name in wanted}
    try:
        register_datasets([spec for spec in specs if spec.name in used], dataset_root())
    except ConfigError as error:
        problems += error.problems
    known = {*DatasetCatalog.list(), *(spec.name for spec in specs)}  # one that failed to register is known, too
    problems += [
        f"XLEARNER.{where} names the unknown data set {name!r}.{nearest(name, known)}"
        for where, name in wanted
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)


def load_records(
    sources: Sequence[SourceSpec], probes: Sequence[ProbeSpec], *, check_images: int
) -> dict[str, Records]:
    """Read and check the records of every data set of the sources and probes.

    Args:
        check_images: images per data set that are decoded; -1 for all.

    Returns:
        records by data set.

    Raises:
        ConfigError: with every problem found in any data set.
    """
    problems: list[str] = []
    users = {f"source {s.name}": (*s.train, *s.test) for s in sources}
    users |= {f"probe {p.name}": (p.train, p.test) for p in probes}
    records: dict[str, Records] = {}
    for name in dict.fromkeys(name for names in users.values() for name in names):
        by = ", ".join(user for user, names in users.items() if name in names)
        try:
            records[name] = DatasetCatalog.get(name)
        except (ValueError, OSError, KeyError, AssertionError, ImportError) as error:
            found = (
                error.problems if isinstance(error, ConfigError) else [f"data set {name!r}: {error}{_advice(error)}"]
            )
        else:
            found = check_records(name, records[name], MetadataCatalog.get(name), max_images=check_images)
        problems += [f"{by}: {problem}" for problem in found]
    if not problems:
        problems += [f"{user}: {problem}" for user, names in users.items() for problem in check_same_classes(names)]
        problems += [problem for probe in probes for problem in _check_probe(probe, records)]
    if problems:
        raise ConfigError(problems, what="The data")
    return records


def _check_probe(probe: ProbeSpec, records: Mapping[str, Records]) -> list[str]:
    """Found now, as the probe is fitted at the very end, with a share of each class held out."""
    where = f"probe {probe.name}"
    problems = [f"{where}: {problem}" for problem in check_labels((probe.train, probe.test), records)]
    counts = Counter(record.get("category_id") for record in records[probe.train])
    if not problems and max(counts.values()) == 1:
        problems.append(
            f"{where}: no class of data set {probe.train!r} has more than one image, but one of some class has to be "
            "held out to choose the regularisation."
        )
    if not problems and len(counts) == 1:
        problems.append(f"{where}: data set {probe.train!r} has images of one class alone, but two are expected.")
    if probe.image_size < 1:
        problems.append(f"XLEARNER.PROBES.{probe.name}.IMAGE_SIZE is {probe.image_size}, but at least 1 is expected.")
    return problems


def check_labels(names: Iterable[str], records: Mapping[str, Records]) -> list[str]:
    """Problems of data sets whose images should have one class each, as a probe needs it."""
    problems = []
    for name in names:
        lacking = [record["file_name"] for record in records[name] if "category_id" not in record]
        if lacking:
            got = f"{len(lacking)} of {len(records[name])} images have no category_id, as {shown(lacking[0])}"
            problems.append(f"data set {name!r}: {got}, but a probe needs one class of each image.")
    return problems


def _advice(error: Exception) -> str:
    if getattr(error, "name", None) == "lvis":  # which Detectron2's reader of LVIS imports
        return ". Give its files a record of FORMAT lvis, under another name, which needs no such package."
    return ""


def source_data(source: SourceSpec, head: CfgNode, records: Mapping[str, Records], *, seed: int) -> SourceData:
    """What a source's head learns from and is tested on.

    Args:
        head: the config of the source's head.
        records: by data set.
        seed: of what ``TRAIN_SHARE`` draws.

    Raises:
        ConfigError: when proposals are missing, or no image or not every object has what the head learns from.
    """
    train_files, test_files = proposal_files(source, head)

    def read(name: str, files: Mapping[str, str]) -> Records:
        return with_proposals(name, records[name], files[name]) if files else records[name]

    train = [record for name in source.train for record in read(name, train_files)]
    train = _usable(train, source, head)
    if problems := [*_other_labels(source, head), *_incomplete_objects(train, source, head)]:
        raise ConfigError(problems, what="The data")
    train = share_of_records(train, source.train_share, seed=seed)
    train = _without_masks(train) if not (head.MODEL.MASK_ON or head.INPUT.MAPPER) else train
    return SourceData(
        train=DatasetFromList(train, copy=False) if train else [],  # a frozen source may have none
        test={name: read(name, test_files) for name in source.test},
    )


def _usable(records: Records, source: SourceSpec, head: CfgNode) -> Records:
    """The images that Detectron2 would train on."""
    where = _train_setting(source)
    if not records or "annotations" not in records[0] or not head.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return records
    if head.MODEL.META_ARCHITECTURE == "ImageClassifier":  # of which an image may have no class
        return records
    kept = filter_images_with_only_crowd_annotations(records)
    if not kept:
        raise ConfigError([f"{where}: no image has an annotation."], what="The data")
    if left_out := len(records) - len(kept):
        data = f"data set{'s' * (len(source.train) > 1)} {', '.join(map(repr, source.train))}"
        text = f"{data}: {left_out} of {len(records)} images have no object to learn from and are left out."
        cure = "Set DATALOADER.FILTER_EMPTY_ANNOTATIONS False in OPTS to learn from them as background."
        # Once, as a study reads the same data for each of its runs.
        log_first_n(logging.WARNING, f"{text} {cure}", key="message")
    fewest = head.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if head.MODEL.KEYPOINT_ON else 0
    kept = filter_images_with_few_keypoints(kept, fewest) if fewest else kept
    if not kept:
        message = (
            f"{where}: no image has {fewest} visible keypoint(s) (MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)."
        )
        raise ConfigError([message], what="The data")
    return kept


def _other_labels(source: SourceSpec, head: CfgNode) -> list[str]:
    """Data sets that mean something else by the same label or keypoint: a head has one meaning for all of them."""
    problems = []
    meant = [
        ("ignore_label", source.train, head.MODEL.SEM_SEG_HEAD.IGNORE_VALUE),
        ("keypoint_names", source.data_sets if head.MODEL.KEYPOINT_ON else (), None),
    ]
    for key, names, usual in meant:
        found = {name: MetadataCatalog.get(name).get(key, usual) for name in names}
        first = next(iter(found), "")
        problems += [
            f"XLEARNER.SOURCES.{source.name}: data sets {first!r} and {name!r} should have the same {key}, but they "
            f"have {found[first]} and {value}."
            for name, value in found.items()
            if value != found[first]
        ]
    return problems


def _incomplete_objects(records: Records, source: SourceSpec, head: CfgNode) -> list[str]:
    """Detectron2's mapper takes the first object of an image for all, and heads fail at images that differ in it."""
    if head.INPUT.MAPPER or head.MODEL.META_ARCHITECTURE == "ImageClassifier":  # which may need nothing of the kind
        return []
    problems = []
    learned = {setting: of for setting, of in _LEARNED.items() if head.MODEL[setting]}
    total = sum(len(_objects(record)) for record in records)
    for setting, (key, name, cure) in learned.items():
        lacking = [record["file_name"] for record in records for it in _objects(record) if key not in it]
        if lacking:
            lack = f"{len(lacking)} of {total} objects have no {name} ({key}), as in {lacking[0]}"
            wish = f"MODEL.{setting} needs that of each: {cure}, or set MODEL.{setting} False in OPTS"
            problems.append(f"{_train_setting(source)}: {lack}, but {wish}.")
    pixels = [record["file_name"] for record in records for it in _objects(record) if _is_rle(it)]
    if pixels and head.MODEL.MASK_ON and head.INPUT.MASK_FORMAT == "polygon":
        got = f"{len(pixels)} of {total} objects have an RLE mask, as in {pixels[0]}"
        text = f"{got}, but INPUT.MASK_FORMAT is 'polygon'. Set it to bitmask in OPTS."
        problems.append(f"{_train_setting(source)}: {text}")
    return problems


def _is_rle(item: dict[str, Any]) -> bool:
    return isinstance(item.get("segmentation"), dict)


def _objects(record: dict[str, Any]) -> Records:
    """Those of a record that are learned from: all but crowds."""
    return [it for it in record.get("annotations", ()) if not it.get("iscrowd", 0)]


def _train_setting(source: SourceSpec) -> str:
    return f"XLEARNER.SOURCES.{source.name}.TRAIN {list(source.train)}"


def _without_masks(records: Records) -> Records:
    """Without what Detectron2's mapper would copy for every image, only to drop it."""

    def bare(record: dict[str, Any]) -> dict[str, Any]:
        objects = [{key: of for key, of in it.items() if key != "segmentation"} for it in record["annotations"]]
        return {**record, "annotations": objects}

    return [bare(record) if "annotations" in record else record for record in records]
