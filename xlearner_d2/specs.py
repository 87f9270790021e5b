"""One record per data set, per source and per task: parsed from YAML, validated as a whole, explained in errors.

Nothing here builds or reads data; the later modules take these records instead of the config.
"""

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from torch import nn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: Keys of ``XLEARNER.DATASETS.<name>`` that each ``FORMAT`` takes: (required, optional).
DATASET_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "coco": (frozenset({"IMAGES", "ANNOTATIONS"}), frozenset()),
    "coco_panoptic": (frozenset({"IMAGES", "ANNOTATIONS", "LABELS"}), frozenset()),
    "lvis": (frozenset({"IMAGES", "ANNOTATIONS"}), frozenset()),
    "voc": (frozenset({"ROOT"}), frozenset({"SPLIT", "CLASSES", "YEAR", "EVALUATION"})),
    "sem_seg": (
        frozenset({"IMAGES", "LABELS", "CLASSES"}),
        frozenset({"IGNORE_VALUE", "REDUCE_ZERO_LABEL", "LIST", "IMAGE_SUFFIX", "LABEL_SUFFIX"}),
    ),
    "image_folder": (frozenset({"IMAGES"}), frozenset({"CLASSES"})),
    "image_list": (frozenset({"LIST"}), frozenset({"IMAGES", "CLASSES", "COLUMNS", "MULTI_LABEL"})),
    "webdataset": (frozenset({"SHARDS"}), frozenset({"CLASSES"})),
    "depth": (frozenset({"IMAGES", "LABELS"}), frozenset({"SCALE"})),
    "torchvision": (frozenset({"DATASET", "SPLIT"}), frozenset({"ROOT"})),
}

#: What ``SAMPLER`` of a source may be, besides empty.
SAMPLERS = ("shuffle", "class_aware", "repeat_factor")


class ConfigError(ValueError):
    """All problems of a configuration or of its data, in one message."""

    def __init__(self, problems: Sequence[str], *, what: str = "The configuration"):
        self.problems = list(problems)
        self.what = what
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        super().__init__("\n".join([f"{what} has {count}:", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is on the way from another process: an exception would be made anew from its text."""
        return functools.partial(type(self), what=self.what), (self.problems,)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set on disk, to be registered under ``name``. Relative paths start at ``$DETECTRON2_DATASETS``.

    Attributes:
        name: the name that ``TRAIN`` and ``TEST`` of a source refer to.
        format: one of ``DATASET_KEYS``.
        images: folder of images (coco, coco_panoptic, lvis, sem_seg, depth), of one folder per class (image_folder), or
            where the paths of a list start; that is the list's own folder unless given (image_list).
        annotations: json file (coco, coco_panoptic, lvis).
        labels: folder of label PNGs named like the images (sem_seg), or of the PNGs that the json names
            (coco_panoptic), or of depth PNGs or .npy files named like the images (depth).
        scale: what a metre is in the files: 1000 for millimetres (depth).
        list: file with one image a line: those to read (sem_seg), or each with its label (image_list).
        image_suffix, label_suffix: end of a file's name that images and labels do not share, such as _leftImg8bit and
            _gtFine_labelTrainIds; files without it are not read (sem_seg).
        reduce_zero_label: label 0 is ignored, and label k is class k - 1, as in ADE20K (sem_seg).
        columns: of the path and of the label, each by its name in the header or by its number from 0 (image_list).
        multi_label: an image has any number of labels, separated by semicolons or spaces (image_list).
        shards: tar files: a path that may hold ``*`` and ``{000..127}`` (webdataset).
        root: folder that holds JPEGImages, Annotations and ImageSets, or images beside their XML files (voc), or
            torchvision's own root (torchvision).
        split: name of a file below ``ImageSets/Main`` without ``.txt``, or of a folder of images beside their XML
            files (voc), or train, test, train+val… (torchvision).
        dataset: class in ``torchvision.datasets``, such as CIFAR10 (torchvision).
        classes: class names in order of their index, or a file that has one name a line.
        ignore_value: label that is not evaluated and gives no loss (sem_seg).
        year: 2007 for the 11-point average precision, 2012 for the area under the curve (voc).
        evaluation: voc for Pascal VOC's average precision, coco for COCO's (voc).
        license: under which the data are, in any format; it is told in the model cards of what is trained on them.
    """

    name: str
    format: str
    images: str = ""
    annotations: str = ""
    labels: str = ""
    list: str = ""
    image_suffix: str = ""
    label_suffix: str = ""
    reduce_zero_label: bool = False
    columns: tuple[Any, ...] = ()
    multi_label: bool = False
    shards: str = ""
    root: str = ""
    split: str = ""
    dataset: str = ""
    classes: tuple[str, ...] | str = ()
    ignore_value: int = 255
    year: int = 2012
    evaluation: str = "voc"
    scale: float = 1000.0
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A data set family with one label space, the head that learns it and the task (branch) it belongs to.

    Attributes:
        name: unique; used in log lines, metrics and loss names.
        task: free name; sources with the same task share a branch.
        config: the Detectron2 config whose model becomes this source's head; a file or a model-zoo path.
        train: names of registered data sets, concatenated; needed unless the source is frozen (``XLEARNER.FREEZE``).
        test: names of registered data sets, evaluated one by one.
        train_share: of the training images this share, drawn by ``SEED``; of each class where every image has one.
        ims_per_batch: images of this source in each step, over all workers.
        loss_weight: factor on every loss of this source.
        sampler: shuffle (each image once an epoch), class_aware (all classes equally often), repeat_factor (images of
            rare classes more often); as ``DATALOADER.SAMPLER_TRAIN`` of ``config`` says when empty.
        opts: overrides for ``config``, as alternating keys and values.
    """

    name: str
    task: str
    config: str
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    train_share: float = 1.0
    ims_per_batch: int = 16
    loss_weight: float = 1.0
    sampler: str = ""
    opts: tuple[Any, ...] = ()

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Those that it is trained on, then those that it is tested on; the first one's metadata has its classes."""
        return (*self.train, *self.test)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A branch of the expanded backbone.

    Attributes:
        name: the task's name.
        sources: names of the sources that train it.
        out_features: the deepest-first union of stages its heads read, in network order.
        res5_dilation: 1, or 2 where the heads ask for a dilated res5 (its stride is then 16).
    """

    name: str
    sources: tuple[str, ...]
    out_features: tuple[str, ...]
    res5_dilation: int = 1


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """A linear probe of the student at the end of a run: classification of a downstream data set.

    Attributes:
        name: for tables.
        train, test: each the name of one registered data set of image classes, not a list.
        image_size: side in pixels of the square the images are cropped to.
    """

    name: str
    train: str
    test: str
    image_size: int = 128


Record = TypeVar("Record", bound="DataclassInstance")
#: type of a field -> what YAML may give for it, and how that is called in an error
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    str: ((str,), "a string"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    tuple: ((list, tuple), "a list"),
}
_PLURALS = {str: "strings", int: "whole numbers"}


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known name, else the start of the list of known names."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}." if known else ""


def one_of(key: str, value: str, known: Iterable[str]) -> list[str]:
    """The problem of a setting below ``XLEARNER`` whose value is none of the known names; none where it is."""
    names = list(known)
    return [] if value in names else [f"XLEARNER.{key} is {value!r}.{nearest(value, names)}"]


def _check_value(where: str, key: str, value: Any, kind: Any) -> list[str]:
    """Problems of one value, judged by the type of its field."""
    if key == "CLASSES" and isinstance(value, str):
        return []  # the file that holds them
    expected, words = _KINDS[tuple if isinstance(kind, UnionType) else get_origin(kind) or kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        return [f"{where}.{key} is {value!r}, but {words} is expected."]
    if not isinstance(value, list | tuple):
        return []
    wanted = str if isinstance(kind, UnionType) else get_args(kind)[0]
    if wanted is not Any and not all(isinstance(item, wanted) for item in value):
        return [f"{where}.{key} is {list(value)!r}, but a list of {_PLURALS[wanted]} is expected."]
    return []


def parse_record(cls: type[Record], name: str, record: Any, where: str, problems: list[str]) -> Record | None:
    """Turn one YAML mapping into ``cls``, a dataclass with a name; append what is wrong with it to ``problems``."""
    if not isinstance(record, Mapping):
        problems.append(f"{where} is {record!r}, but a mapping such as {{{', '.join(_keys(cls)[:3])}, …}} is expected.")
        return None
    found: list[str] = []
    by_key = {field.name.upper(): field for field in fields(cls) if field.name != "name"}
    for key in record:
        if key not in by_key:
            found.append(f"{where} has the unknown key {key!r}.{nearest(key, by_key)}")
        else:
            found += _check_value(where, key, record[key], by_key[key].type)
    for key, field in by_key.items():
        if field.default is MISSING and key not in record:
            found.append(f"{where} lacks the key {key}.")
    problems += found
    if found:
        return None
    values = {key.lower(): tuple(v) if isinstance(v, list | tuple) else v for key, v in record.items()}
    return cls(name=name, **values)  # type: ignore[call-arg]  # checked above


def _keys(cls: type) -> list[str]:
    return [field.name.upper() for field in fields(cls) if field.name != "name"]


def parse_datasets(records: Mapping[str, Any], problems: list[str]) -> list[DatasetSpec]:
    """Parse ``XLEARNER.DATASETS``; a null record is skipped, so that a derived config can drop one."""
    parsed = []
    for name, record in records.items():
        if record is None:
            continue
        where = f"XLEARNER.DATASETS.{name}"
        spec = parse_record(DatasetSpec, name, record, where, problems)
        if spec is None:
            continue
        if spec.format not in DATASET_KEYS:
            problems.append(f"{where}.FORMAT is {spec.format!r}.{nearest(spec.format, DATASET_KEYS)}")
            continue
        required, optional = DATASET_KEYS[spec.format]
        given = {key for key in record if key != "FORMAT"}
        if required - given:
            problems.append(f"{where} lacks {', '.join(sorted(required - given))}, needed for FORMAT {spec.format!r}.")
        for key in sorted(given - required - optional - {"LICENSE"}):
            problems.append(f"{where}.{key} has no meaning for FORMAT {spec.format!r}.")
        parsed.append(spec)
    return parsed


def _check_name(name: str, where: str) -> list[str]:
    """Names of sources and tasks become names of sub-modules, where PyTorch refuses those of its own attributes."""
    taken = hasattr(nn.ModuleDict(), name)
    return [f"{where}: the name {name!r} has a meaning in PyTorch; choose another one."] if taken else []


def _check_source(spec: SourceSpec, where: str, world_size: int, *, frozen: bool) -> list[str]:
    problems = _check_name(str(spec.name), where) + _check_name(spec.task, f"{where}.TASK")
    if not spec.task.isidentifier():
        problems.append(f"{where}.TASK is {spec.task!r}, but a name of letters, digits and underscores is expected.")
    if not spec.train and not frozen:
        problems.append(f"{where}.TRAIN is empty, but at least one data set is needed.")
    if spec.ims_per_batch < 1 or spec.ims_per_batch % world_size:
        workers = f" that {world_size} workers can share evenly" if world_size > 1 else ""
        problems.append(f"{where}.IMS_PER_BATCH is {spec.ims_per_batch}, but a positive number{workers} is expected.")
    if not 0 < spec.train_share <= 1:
        problems.append(f"{where}.TRAIN_SHARE is {spec.train_share}, but more than 0 and at most 1 is expected.")
    if not 0 <= spec.loss_weight < float("inf"):
        problems.append(f"{where}.LOSS_WEIGHT is {spec.loss_weight}, but a finite number of at least 0 is expected.")
    if spec.sampler and spec.sampler not in SAMPLERS:
        problems.append(f"{where}.SAMPLER is {spec.sampler!r}.{nearest(spec.sampler, SAMPLERS)}")
    return [*problems, *pair_problems(f"{where}.OPTS", spec.opts)]


def pair_problems(where: str, opts: Sequence[Any]) -> list[str]:
    """Whether a list has names of settings and their values in turn."""
    if len(opts) % 2:
        return [f"{where} has {len(opts)} entries, but pairs of key and value are expected."]
    wish = ", but the name of a setting is expected, then its value, and so on in one list."
    return [f"{where} has {key!r}{wish}" for key in opts[::2] if not isinstance(key, str)]


def parse_sources(
    records: Mapping[str, Any], problems: list[str], *, world_size: int = 1, frozen_tasks: Sequence[str] = ()
) -> list[SourceSpec]:
    """Parse ``XLEARNER.SOURCES``; a null record is skipped, so that a derived config can drop a source.

    Args:
        frozen_tasks: ``XLEARNER.FREEZE``; their sources may be without TRAIN.
    """
    parsed = []
    for name, record in records.items():
        if record is None:
            continue
        where = f"XLEARNER.SOURCES.{name}"
        if not str(name).isidentifier():
            problems.append(f"{where}: {name!r} is no source name; letters, digits and underscores are expected.")
        spec = parse_record(SourceSpec, name, record, where, problems)
        if spec is not None:
            problems += _check_source(spec, where, world_size, frozen=spec.task in frozen_tasks)
            parsed.append(spec)
    if not parsed and not problems:
        problems.append("XLEARNER.SOURCES is empty, but at least one source is needed.")
    return parsed


def parse_records(cls: type[Record], records: Mapping[str, Any], where: str, problems: list[str]) -> list[Record]:
    """Parse a section, such as ``XLEARNER.PROBES``; a null record is skipped, so that a derived config can drop one."""
    found = [
        parse_record(cls, name, record, f"{where}.{name}", problems)
        for name, record in records.items()
        if record is not None
    ]
    return [spec for spec in found if spec is not None]
