"""A suite: the downstream sets, and what is done with a backbone on each; parsed and checked as a whole."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import check_config_file, read_python_settings
from ..data.builtin import dataset_root, register_datasets
from ..data.check import check_records, check_same_classes
from ..data.sources import check_labels
from ..engine.branches import check_networks
from ..evaluation.build import METRICS
from ..extensions import import_modules
from ..modeling.expanded import STAGES
from ..modeling.heads import find_config
from ..settings import AMP_PRECISIONS, usable_device
from ..specs import ConfigError, DatasetSpec, nearest, pair_problems, parse_datasets, parse_record

FAMILIES = ("classification", "detection", "segmentation")
#: kind -> the options that have a meaning for it, besides its metric
USED = {
    "linear_probe": {"image_size", "feature", "images_per_class", "curve", "train_share"},
    "knn": {"image_size", "feature", "k", "images_per_class", "curve", "train_share"},
    "fine_tune": {"config", "ims_per_batch", "opts", "train_share"},
}
KINDS = tuple(USED)
#: What Detectron2's evaluators call the results of each family; a fine-tuning's metric starts with one of them.
RESULTS = {
    "classification": ("classification",),
    "detection": ("bbox", "segm", "keypoints"),
    "segmentation": ("sem_seg", "panoptic_seg"),
}


@dataclass(frozen=True, kw_only=True)
class ProtocolSpec:
    """One way to measure a backbone on a set; ``TRANSFER.PROTOCOLS.<name>``.

    Attributes:
        name: of the protocol.
        kind: linear_probe (multinomial logistic regression on frozen features, its regularisation chosen on a
            held-out fifth of the training images), knn (by cosine similarity of frozen features) or fine_tune (train
            the model of ``config``, where ``MODEL.BACKBONE.FREEZE_AT`` 5 keeps the backbone frozen).
        metric: top1 or mean_class_acc (linear_probe), top1 (knn), or as Detectron2's evaluators call it, such as
            bbox/AP or sem_seg/mIoU (fine_tune).
        image_size: side in pixels of the squares that are cropped (linear_probe, knn).
        feature: the stage that is pooled (linear_probe, knn).
        k: neighbours that vote (knn).
        images_per_class: of the training images so many of each class, drawn by the seed; 0 takes all
            (linear_probe, knn).
        curve: numbers of images of each class for which the report draws a curve, beside the value
            (linear_probe, knn).
        train_share: of the training images this share, drawn by the seed.
        config: the Detectron2 config to train; a file or a model-zoo path (fine_tune).
        ims_per_batch: of the fine-tuning (fine_tune).
        opts: overrides of ``config``, as alternating keys and values (fine_tune).
    """

    name: str
    kind: str
    metric: str
    image_size: int = 224
    feature: str = "res5"
    k: int = 10
    images_per_class: int = 0
    curve: tuple[int, ...] = ()
    train_share: float = 1.0
    config: str = ""
    ims_per_batch: int = 16
    opts: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One downstream set; ``TRANSFER.SETS.<name>``.

    Attributes:
        name: of the set.
        family: classification, detection (boxes or instances) or segmentation.
        train: names of registered data sets, concatenated.
        test: name of a registered data set.
        protocols: names of the protocols to run; the first is the one that counts in summaries.
    """

    name: str
    family: str
    train: tuple[str, ...]
    test: str
    protocols: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A validated suite.

    Attributes:
        name: of the suite.
        cfg: the whole config; decides the backbone's architecture, input and device.
        sets: by name.
        protocols: by name.
        datasets: records of ``XLEARNER.DATASETS`` by name, as they enter the settings of a cell.
    """

    name: str
    cfg: CfgNode
    sets: Mapping[str, SetSpec]
    protocols: Mapping[str, ProtocolSpec]
    datasets: Mapping[str, DatasetSpec]

    @property
    def primary(self) -> dict[str, str]:
        """The protocol that counts in summaries, by set."""
        return {name: spec.protocols[0] for name, spec in self.sets.items()}

    def settings(self, spec: SetSpec, protocol: ProtocolSpec) -> str:
        """SHA-256 of everything in the suite that bears on a cell, so that a changed one is measured again."""
        what = {"protocol": _given(protocol), "config": read_config(protocol.config) if protocol.config else ""}
        return digest({**self._common(spec), **what})

    def feature_settings(self, spec: SetSpec, protocol: ProtocolSpec) -> str:
        """SHA-256 of everything in the suite that bears on the features of a linear probe, which protocols share."""
        return digest({**self._common(spec), "feature": protocol.feature, "image_size": protocol.image_size})

    def _common(self, spec: SetSpec) -> dict[str, Any]:
        names = sorted({*spec.train, spec.test})
        timm, precision = self.cfg.MODEL.BACKBONE.TIMM, self.cfg.XLEARNER.AMP_PRECISION
        return {
            "set": {key: value for key, value in asdict(spec).items() if key != "protocols"},
            "data": {name: _given(self.datasets[name]) for name in names if name in self.datasets},
            "resnets": self.cfg.MODEL.RESNETS,
            "input": [self.cfg.INPUT.FORMAT, self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD],
            "amp": self.cfg.SOLVER.AMP.ENABLED,
            **({"timm": timm} if timm else {}),
            **({"precision": precision} if precision != AMP_PRECISIONS[0] else {}),
        }


def digest(what: Mapping[str, Any]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _given(record: Any) -> dict[str, Any]:
    """The fields that are not at their defaults, so that an option added later changes no digest."""
    return {
        field.name: getattr(record, field.name)
        for field in fields(record)
        if field.default is MISSING or getattr(record, field.name) != field.default
    }


def read_config(config: str) -> str:
    """The content of a config that has been checked, with that of the files it is based on."""
    path = find_config(config)
    python = path.endswith(".py")
    loaded = read_python_settings(path) if python else CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    return json.dumps(loaded, sort_keys=True, default=str)


def _check_fine_tune(spec: ProtocolSpec, where: str) -> list[str]:
    problems = []
    if "/" not in spec.metric:
        problems.append(f"{where}.METRIC is {spec.metric!r}, but one such as bbox/AP or sem_seg/mIoU is expected.")
    try:
        check_config_file(find_config(spec.config))
    except ConfigError as error:
        problems += [f"{where}.CONFIG is {spec.config!r}: {problem}" for problem in error.problems]
    return [*problems, *pair_problems(f"{where}.OPTS", spec.opts)]


def _check_probe(spec: ProtocolSpec, where: str) -> list[str]:
    known = ("top1", "mean_class_acc") if spec.kind == "linear_probe" else ("top1",)
    problems = []
    if spec.metric not in known:
        problems.append(f"{where}.METRIC is {spec.metric!r}.{nearest(spec.metric, known)}")
    if spec.feature not in STAGES:
        problems.append(f"{where}.FEATURE is {spec.feature!r}.{nearest(spec.feature, STAGES)}")
    for key, counts in (("IMAGES_PER_CLASS", [spec.images_per_class]), ("CURVE", spec.curve)):
        if spec.kind == "linear_probe" and 1 in counts:
            problems.append(f"{where}.{key} is 1, but one more is held out to choose the regularisation.")
    if min(spec.curve, default=1) < 1:
        problems.append(f"{where}.CURVE is {list(spec.curve)}, but numbers of at least 1 are expected.")
    return problems


def _unused(spec: ProtocolSpec, where: str) -> list[str]:
    """Options that are given, but mean nothing for the kind."""
    return [
        f"{where}.{field.name.upper()} has no meaning for KIND {spec.kind}."
        for field in fields(spec)
        if field.name not in USED[spec.kind]
        and field.default is not MISSING
        and getattr(spec, field.name) != field.default
    ]


def _check_protocol(spec: ProtocolSpec, where: str) -> list[str]:
    if spec.kind not in KINDS:
        return [f"{where}.KIND is {spec.kind!r}.{nearest(spec.kind, KINDS)}"]
    problems = _check_fine_tune(spec, where) if spec.kind == "fine_tune" else _check_probe(spec, where)
    for key, value, low in (
        ("IMAGE_SIZE", spec.image_size, 1),
        ("K", spec.k, 1),
        ("IMAGES_PER_CLASS", spec.images_per_class, 0),
        ("IMS_PER_BATCH", spec.ims_per_batch, 1),
    ):
        if value < low:
            problems.append(f"{where}.{key} is {value}, but at least {low} is expected.")
    problems += _unused(spec, where)
    if not 0 < spec.train_share <= 1:
        problems.append(f"{where}.TRAIN_SHARE is {spec.train_share}, but more than 0 and at most 1 is expected.")
    return problems


def _check_set(spec: SetSpec, where: str, protocols: Mapping[str, ProtocolSpec], known: set[str]) -> list[str]:
    problems = []
    if spec.family not in FAMILIES:
        problems.append(f"{where}.FAMILY is {spec.family!r}.{nearest(spec.family, FAMILIES)}")
    for key in ("train", "protocols"):
        if not getattr(spec, key):
            problems.append(f"{where}.{key.upper()} is empty, but at least one name is needed.")
        problems += [f"{where}.{key.upper()} has {name!r} twice." for name in _repeated(getattr(spec, key))]
    for name in (*spec.train, spec.test):
        if name not in known:
            problems.append(f"{where} names the unknown data set {name!r}.{nearest(name, known)}")
    for name in spec.protocols:
        if name not in protocols:
            problems.append(f"{where}.PROTOCOLS names the unknown protocol {name!r}.{nearest(name, protocols)}")
        elif spec.family in FAMILIES:
            problems += _check_pair(spec, protocols[name], where)
    return problems


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _check_pair(spec: SetSpec, protocol: ProtocolSpec, where: str) -> list[str]:
    """Whether a protocol suits a set of this family."""
    if protocol.kind != "fine_tune":
        if spec.family == "classification":
            return []
        return [f"{where}.PROTOCOLS: {protocol.name} is for classification, but FAMILY is {spec.family}."]
    kind, _, name = protocol.metric.partition("/")
    has = f"{where}.PROTOCOLS: {protocol.name} has METRIC {protocol.metric}"
    if kind not in RESULTS[spec.family]:
        return [f"{has}, but {spec.family} has {', '.join(RESULTS[spec.family])}."]
    if name not in METRICS[kind] and "-" not in name:  # that of a class shows once it is evaluated
        return [f"{has}.{nearest(protocol.metric, (f'{kind}/{known}' for known in METRICS[kind]))}"]
    return []


def parse_suite(cfg: CfgNode) -> Suite:
    """Parse and register a suite, without reading its data.

    Raises:
        ConfigError: with all problems.
    """
    import_modules(cfg.XLEARNER.IMPORTS)
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = usable_device(cfg)
    cfg.freeze()
    problems = check_networks(cfg, [])
    datasets = {spec.name: spec for spec in parse_datasets(cfg.XLEARNER.DATASETS, problems)}
    protocols = _parse_all(ProtocolSpec, cfg.TRANSFER.PROTOCOLS, "TRANSFER.PROTOCOLS", problems)
    for name, protocol in protocols.items():
        problems += _check_protocol(protocol, f"TRANSFER.PROTOCOLS.{name}")
    sets = _parse_all(SetSpec, cfg.TRANSFER.SETS, "TRANSFER.SETS", problems)
    used = {name for spec in sets.values() for name in (*spec.train, spec.test)}
    try:  # others need not be there
        register_datasets([spec for name, spec in datasets.items() if name in used], dataset_root())
    except ConfigError as error:
        problems += error.problems
    dropped = {name for name, record in cfg.XLEARNER.DATASETS.items() if record is None}
    known = {*DatasetCatalog.list(), *cfg.XLEARNER.DATASETS} - dropped  # one that failed to register is known, too
    for name, spec in sets.items():
        problems += _check_set(spec, f"TRANSFER.SETS.{name}", protocols, known)
    if not sets and not problems:
        problems.append("TRANSFER.SETS is empty, but at least one downstream set is needed.")
    if problems:
        raise ConfigError(problems, what="The suite")
    return Suite(name=cfg.TRANSFER.NAME, cfg=cfg, sets=sets, protocols=protocols, datasets=datasets)


def _parse_all(cls: Any, records: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Null records are skipped, so that a derived suite or the command line can drop one."""
    problems += [
        f"{where} has the name {name!r}, but letters, digits, - and _ are expected, as it names a folder of records."
        for name in records
        if not re.fullmatch(r"[\w-]+", str(name))
    ]
    found = {
        name: parse_record(cls, name, record, f"{where}.{name}", problems)
        for name, record in records.items()
        if record is not None
    }
    return {name: spec for name, spec in found.items() if spec is not None}


def check_data(suite: Suite, *, check_images: int) -> None:
    """Read and check the records of every set.

    Raises:
        ConfigError: with every problem found in any set.
    """
    problems = []
    for spec in suite.sets.values():
        names = (*spec.train, spec.test)
        found = [f for name in names for f in _check_dataset(name, check_images)] or check_same_classes(names)
        if not found and any(suite.protocols[name].kind != "fine_tune" for name in spec.protocols):
            found = check_labels(names, {name: DatasetCatalog.get(name) for name in names})
        problems += [f"{spec.name}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems, what="The suite's data")


def _check_dataset(name: str, check_images: int) -> list[str]:
    try:
        records = DatasetCatalog.get(name)
    except (ValueError, OSError, KeyError, AssertionError, ImportError) as error:
        return error.problems if isinstance(error, ConfigError) else [f"data set {name!r}: {error}"]
    return check_records(name, records, MetadataCatalog.get(name), max_images=check_images)
