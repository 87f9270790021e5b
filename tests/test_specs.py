"""Records of data sets and sources: what is accepted, and that everything wrong is said at once."""

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlearner_d2.specs import (
    DATASET_KEYS,
    ConfigError,
    DatasetSpec,
    SourceSpec,
    nearest,
    parse_datasets,
    parse_sources,
)

GOOD = {"TASK": "detection", "CONFIG": "head.yaml", "TRAIN": ["a", "b"]}
COCO = {"FORMAT": "coco", "IMAGES": "images", "ANNOTATIONS": "a.json"}


def sources(records: dict[Any, Any], **options: Any) -> tuple[list[SourceSpec], list[str]]:
    problems: list[str] = []
    return parse_sources(records, problems, **options), problems


def datasets(records: dict[Any, Any]) -> tuple[list[DatasetSpec], list[str]]:
    problems: list[str] = []
    return parse_datasets(records, problems), problems


def test_source_with_defaults() -> None:
    expected = SourceSpec(
        name="coco", task="detection", config="head.yaml", train=("a", "b"), test=(), ims_per_batch=16
    )
    assert sources({"coco": GOOD}) == ([expected], [])
    assert (expected.loss_weight, expected.opts) == (1.0, ())


def test_source_with_everything() -> None:
    more = {"TEST": ("c",), "IMS_PER_BATCH": 8, "LOSS_WEIGHT": 2, "OPTS": ["MODEL.MASK_ON", True]}
    (found,), problems = sources({"coco": {**GOOD, **more}}, world_size=4)
    assert problems == []
    assert (found.test, found.ims_per_batch, found.loss_weight) == (("c",), 8, 2)
    assert found.opts == ("MODEL.MASK_ON", True)


def test_order_is_kept_and_null_drops() -> None:
    found, problems = sources({"b": GOOD, "gone": None, "a": GOOD})
    assert ([source.name for source in found], problems) == (["b", "a"], [])


def test_records_cannot_be_changed() -> None:
    (found,), _ = sources({"coco": GOOD})
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        found.task = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TRAIN": "a"}, r"coco\.TRAIN is 'a', but a list is expected"),
        ({"TRAIN": [1]}, r"coco\.TRAIN is \[1\], but a list of strings is expected"),
        ({"TRAIN": []}, r"coco\.TRAIN is empty, but at least one data set is needed"),
        ({"TASK": 3}, r"coco\.TASK is 3, but a string is expected"),
        ({"TASK": "my task"}, r"coco\.TASK is 'my task', but a name of letters, digits and underscores"),
        ({"CONFIG": None}, r"coco\.CONFIG is None, but a string is expected"),
        ({"IMS_PER_BATCH": "8"}, r"coco\.IMS_PER_BATCH is '8', but a whole number is expected"),
        ({"IMS_PER_BATCH": 8.0}, r"coco\.IMS_PER_BATCH is 8\.0, but a whole number is expected"),
        ({"IMS_PER_BATCH": True}, r"coco\.IMS_PER_BATCH is True, but a whole number is expected"),
        ({"IMS_PER_BATCH": 0}, r"coco\.IMS_PER_BATCH is 0, but a positive number is expected"),
        ({"LOSS_WEIGHT": -1}, r"coco\.LOSS_WEIGHT is -1, but a finite number of at least 0"),
        ({"LOSS_WEIGHT": float("nan")}, r"coco\.LOSS_WEIGHT is nan, but a finite number"),
        ({"LOSS_WEIGHT": float("inf")}, r"coco\.LOSS_WEIGHT is inf, but a finite number"),
        ({"OPTS": ["MODEL.MASK_ON"]}, r"coco\.OPTS has 1 entries, but pairs of key and value are expected"),
        ({"OPTS": {"MODEL.MASK_ON": True}}, r"coco\.OPTS is .*, but a list is expected"),
        ({"IMS_PER_BACH": 8}, r"coco has the unknown key 'IMS_PER_BACH'\. Did you mean 'IMS_PER_BATCH'\?"),
        ({"NAME": "x"}, r"coco has the unknown key 'NAME'"),
        ({1: 8}, r"coco has the unknown key 1"),
    ],
)
def test_bad_source(change: dict[Any, Any], message: str) -> None:
    _, problems = sources({"coco": {**GOOD, **change}})
    with pytest.raises(ConfigError, match=f"has 1 problem:\n  1. XLEARNER.SOURCES.{message}"):
        raise ConfigError(problems)


@pytest.mark.parametrize("record", ["coco", 3, ["TASK"], True])
def test_source_that_is_no_record(record: Any) -> None:
    found, (problem,) = sources({"coco": record})
    assert found == []
    assert problem == (
        f"XLEARNER.SOURCES.coco is {record!r}, but a mapping such as {{TASK, CONFIG, TRAIN, …}} is expected."
    )


@pytest.mark.parametrize("missing", ["TASK", "CONFIG"])
def test_missing_key(missing: str) -> None:
    _, problems = sources({"coco": {key: value for key, value in GOOD.items() if key != missing}})
    assert problems == [f"XLEARNER.SOURCES.coco lacks the key {missing}."]


@pytest.mark.parametrize("frozen", [(), ("detection",)])
def test_only_frozen_sources_do_without_training_data(frozen: tuple[str, ...]) -> None:
    found, problems = sources({"coco": {"TASK": "detection", "CONFIG": "head.yaml"}}, frozen_tasks=frozen)
    lack = "XLEARNER.SOURCES.coco.TRAIN is empty, but at least one data set is needed."
    assert problems == ([] if frozen else [lack])
    assert found[0].data_sets == ()


@pytest.mark.parametrize("name", ["my source", "a-b", "a.b", "", "1st", 1])
def test_bad_source_name(name: Any) -> None:
    _, (problem,) = sources({name: GOOD})
    assert f"{name!r} is no source name; letters, digits and underscores are expected" in problem


@pytest.mark.parametrize("name", ["train", "type", "forward", "training", "values"])
def test_name_that_a_module_has_already(name: str) -> None:
    """They become names of sub-modules, where PyTorch refuses those of its own attributes."""
    _, problems = sources({name: GOOD, "b": {**GOOD, "TASK": name}})
    assert problems == [
        f"XLEARNER.SOURCES.{name}: the name {name!r} has a meaning in PyTorch; choose another one.",
        f"XLEARNER.SOURCES.b.TASK: the name {name!r} has a meaning in PyTorch; choose another one.",
    ]


def test_no_source() -> None:
    for records in ({}, {"gone": None}):
        assert sources(records) == ([], ["XLEARNER.SOURCES is empty, but at least one source is needed."])


@pytest.mark.parametrize(("batch", "world_size", "fine"), [(6, 3, True), (6, 4, False), (2, 4, False), (4, 1, True)])
def test_batches_are_shared_evenly(batch: int, world_size: int, fine: bool) -> None:
    _, problems = sources({"coco": {**GOOD, "IMS_PER_BATCH": batch}}, world_size=world_size)
    message = f"is {batch}, but a positive number that {world_size} workers can share evenly is expected."
    assert problems == ([] if fine else [f"XLEARNER.SOURCES.coco.IMS_PER_BATCH {message}"])


def test_all_problems_of_all_records_at_once() -> None:
    bad = {"TSK": "x", "CONFIG": 1, "TRAIN": "a"}
    found, problems = sources({"one": bad, "two": {**GOOD, "OPTS": [1], "LOSS_WEIGHT": -1}, "three": GOOD})
    assert [source.name for source in found] == ["two", "three"]
    assert len(problems) == 6
    with pytest.raises(ConfigError, match=r"(?s)^The run has 6 problems:\n  1\. .*\n  6\. ") as caught:
        raise ConfigError(problems, what="The run")
    assert caught.value.problems == problems


@pytest.mark.parametrize("kind", DATASET_KEYS)
def test_data_set_of_each_format(kind: str) -> None:
    required, optional = DATASET_KEYS[kind]
    values = {"CLASSES": ["a"], "COLUMNS": [0, "b"], "YEAR": 2007, "IGNORE_VALUE": 0, "SCALE": 1.0}
    values |= {"REDUCE_ZERO_LABEL": True, "MULTI_LABEL": False}
    record = {"FORMAT": kind, **{key: values.get(key, "x") for key in required | optional}}
    (found,), problems = datasets({"mine": record})
    assert problems == []
    assert {field.upper(): getattr(found, field) for field in ("name", "format")} == {"NAME": "mine", "FORMAT": kind}
    _, problems = datasets({"mine": {"FORMAT": kind}})
    assert problems == [f"XLEARNER.DATASETS.mine lacks {', '.join(sorted(required))}, needed for FORMAT {kind!r}."]
    foreign = sorted(set().union(*(a | b for a, b in DATASET_KEYS.values())) - required - optional)
    _, problems = datasets({"mine": {**record, **{key: values.get(key, "x") for key in foreign}}})
    assert problems == [f"XLEARNER.DATASETS.mine.{key} has no meaning for FORMAT {kind!r}." for key in foreign]


def test_data_set_dropped_with_null() -> None:
    assert datasets({"mine": None}) == ([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FORMAT": "cocoo"}, "XLEARNER.DATASETS.mine.FORMAT is 'cocoo'. Did you mean 'coco'?"),
        (
            {"FORMAT": "zip"},
            "XLEARNER.DATASETS.mine.FORMAT is 'zip'. Known: coco, coco_panoptic, depth, image_folder, image_list, "
            "lvis, sem_seg, torchvision, voc, webdataset.",
        ),
        ({"IMAGE": "x"}, "XLEARNER.DATASETS.mine has the unknown key 'IMAGE'. Did you mean 'IMAGES'?"),
        ({"IMAGES": 3}, "XLEARNER.DATASETS.mine.IMAGES is 3, but a string is expected."),
        ({"YEAR": True}, "XLEARNER.DATASETS.mine.YEAR is True, but a whole number is expected."),
        ({"MULTI_LABEL": 1}, "XLEARNER.DATASETS.mine.MULTI_LABEL is 1, but True or False is expected."),
        ({"YEAR": "2007"}, "XLEARNER.DATASETS.mine.YEAR is '2007', but a whole number is expected."),
        ({"CLASSES": [1]}, "XLEARNER.DATASETS.mine.CLASSES is [1], but a list of strings is expected."),
    ],
)
def test_bad_data_set(change: dict[str, Any], message: str) -> None:
    assert datasets({"mine": {**COCO, **change}})[1] == [message]


def test_classes_may_be_a_file_or_a_list() -> None:
    base = {"FORMAT": "sem_seg", "IMAGES": "i", "LABELS": "l"}
    (file, listed), problems = datasets({"a": {**base, "CLASSES": "c.txt"}, "b": {**base, "CLASSES": ["x", "y"]}})
    assert ((file.classes, listed.classes), problems) == (("c.txt", ("x", "y")), [])


def test_nearest_name() -> None:
    assert nearest("detektion", ["detection", "segmentation"]) == " Did you mean 'detection'?"
    assert nearest("xyz", ["b", "a"]) == " Known: a, b."
    assert nearest("xyz", []) == ""
    assert nearest("xyz", [f"n{i:02}" for i in range(20)]).endswith("n11, ….")


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))


@given(st.dictionaries(st.sampled_from([*GOOD, "TEST", "IMS_PER_BATCH", "LOSS_WEIGHT", "OPTS", "X"]), values))
def test_anything_is_a_source_or_a_problem(record: dict[str, Any]) -> None:
    found, problems = sources({"coco": record})
    assert bool(found) or bool(problems)
    assert all(problem.startswith("XLEARNER.SOURCES.coco") for problem in problems)


def test_problems_come_whole_from_another_process() -> None:
    found = pickle.loads(pickle.dumps(ConfigError(["one", "two"], what="The suite")))
    assert isinstance(found, ConfigError)
    assert (found.problems, str(found)) == (["one", "two"], "The suite has 2 problems:\n  1. one\n  2. two")
