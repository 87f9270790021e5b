"""Numberings of classes: both ways lead back, and what an image's labels are."""

from types import SimpleNamespace
from typing import Any

import pytest
from detectron2.data import MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st

from xlearner_d2.labels import PanopticLabels, image_labels


def metadata(things: set[int], stuff: set[int], **others: Any) -> Any:
    maps = {
        "thing_dataset_id_to_contiguous_id": {100 + number: number for number in things},
        "stuff_dataset_id_to_contiguous_id": {100 + number: number for number in stuff},
    }
    return SimpleNamespace(as_dict=lambda: {**maps, **others})


@given(st.sets(st.integers(0, 40), min_size=2), st.data())
def test_numbers_of_a_standard_set_lead_back(numbers: set[int], data: st.DataObject) -> None:
    things = set(data.draw(st.lists(st.sampled_from(sorted(numbers)), min_size=1, unique=True)))
    labels = PanopticLabels.of(metadata(things, numbers - things))
    assert labels is not None
    for number in numbers:
        is_thing = number in things
        found = labels.in_model(number, is_thing=is_thing)
        assert labels.in_data_set(found, is_thing=is_thing) == number
        assert 0 <= found < len(things) if is_thing else 1 <= found < labels.stuff_classes


def test_detectron2s_separated_sets_keep_their_numbers() -> None:
    labels = PanopticLabels.of(MetadataCatalog.get("coco_2017_val_panoptic_separated"))
    assert labels is not None
    assert (len(labels.things), labels.stuff_classes) == (80, 54)
    assert [labels.in_data_set(number, is_thing=True) for number in (0, 79)] == [0, 79]
    assert [labels.in_data_set(number, is_thing=False) for number in (1, 53)] == [1, 53]


def test_detectron2s_standard_set_has_as_many() -> None:
    labels = PanopticLabels.of(MetadataCatalog.get("coco_2017_val_panoptic"))
    assert labels is not None
    assert (len(labels.things), labels.stuff_classes) == (80, 54)


def test_other_sets_are_not_panoptic() -> None:
    assert PanopticLabels.of(MetadataCatalog.get("coco_2017_val")) is None


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"category_ids": [2, 0, 2]}, [0, 2]),
        ({"category_ids": [], "annotations": [{"category_id": 1}]}, []),
        ({"annotations": [{"category_id": 3}, {"category_id": 1}, {"category_id": 3}]}, [1, 3]),
        ({"annotations": []}, []),
        ({"annotations": [{"category_id": 3, "iscrowd": 1}, {"category_id": 1, "iscrowd": 0}]}, [1]),
        ({"category_id": 4}, [4]),
    ],
)
def test_labels_of_an_image(record: dict[str, Any], wanted: list[int]) -> None:
    assert image_labels(record) == wanted
