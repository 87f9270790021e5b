"""COCO panoptic, LVIS and keypoints: the same to Detectron2's readers and to ours, and refused with reasons."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_data import COCO_SPEC, coco_json, read, save_image, write_coco
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.builtin.keypoints import flip_map
from xlearner_d2.data.check import check_records
from xlearner_d2.specs import ConfigError, DatasetSpec

Json = dict[str, Any]
PANOPTIC = DatasetSpec(
    name="x_panoptic", format="coco_panoptic", images="pan/images", labels="pan/labels", annotations="pan/a.json"
)
LVIS = DatasetSpec(name="x_lvis", format="lvis", images="lvis", annotations="lvis/a.json")


def panoptic_json() -> Json:
    """Two images; ids of categories neither sorted nor contiguous, things and stuff mixed."""
    segments = [{"id": 300, "category_id": 9, "iscrowd": 0, "area": 48, "bbox": [0, 0, 6, 8]}]
    more = {"id": 7, "category_id": 4, "iscrowd": 0, "area": 48, "bbox": [6, 0, 6, 8]}
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 12, "height": 8} for n in (1, 2)],
        "categories": [
            {"id": 9, "name": "cat", "isthing": 1},
            {"id": 4, "name": "sky", "isthing": 0},
            {"id": 2, "name": "dog", "isthing": 1},
        ],
        "annotations": [
            {"image_id": 2, "file_name": "2.png", "segments_info": [*segments, more]},
            {"image_id": 1, "file_name": "1.png", "segments_info": segments},
        ],
    }


def write_panoptic(root: Path, data: Json) -> None:
    for number in (1, 2):
        save_image(root / f"pan/images/{number}.jpg")
        ids = np.full((8, 12), 300)
        ids[:, 6:] = 7 if number == 2 else 0
        (root / "pan/labels").mkdir(exist_ok=True)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(root / f"pan/labels/{number}.png")
    (root / "pan/a.json").write_text(json.dumps(data))


def test_panoptic_equals_detectron2(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic_json())
    records = read(PANOPTIC, tmp_path)
    metadata = MetadataCatalog.get("x_panoptic")
    folder = tmp_path / "pan"
    paths = (str(folder / name) for name in ("a.json", "images", "labels"))
    expected = load_coco_panoptic_json(*paths, metadata.as_dict())
    assert records == [{**record, "height": 8, "width": 12} for record in expected]
    assert metadata.thing_classes == metadata.stuff_classes == ["dog", "sky", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 9: 2}
    assert metadata.stuff_dataset_id_to_contiguous_id == {4: 1}
    assert check_records("x_panoptic", records, metadata, max_images=-1) == []


def test_panoptic_metadata_is_that_of_detectron2s_standard_sets(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic_json())
    register_datasets([PANOPTIC], tmp_path)
    theirs = MetadataCatalog.get("coco_2017_val_panoptic").as_dict().keys() - {"name", "json_file"}
    ours = MetadataCatalog.get("x_panoptic").as_dict().keys()
    assert theirs - ours <= {"thing_colors", "stuff_colors"}  # which this json does not have


def test_panoptic_colours_of_the_json(tmp_path: Path) -> None:
    data = panoptic_json()
    for number, item in enumerate(data["categories"]):
        item["color"] = [number, 0, 9]
    write_panoptic(tmp_path, data)
    register_datasets([PANOPTIC], tmp_path)
    assert MetadataCatalog.get("x_panoptic").stuff_colors == [[2, 0, 9], [1, 0, 9], [0, 0, 9]]


def put(*path: Any) -> Callable[[Json], None]:
    """Set the last of ``path`` where the others lead to."""

    def change(data: Any) -> None:
        *steps, last, value = path
        for step in steps:
            data = data[step]
        data[last] = value

    return change


def drop(*path: Any) -> Callable[[Json], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("categories", 0, "isthing"), r"categories\[0\] has 'isthing' None, but 0 or 1 is expected"),
        (put("categories", 1, "id", 9), r"categories\[1\] repeats the id or name of another category"),
        (put("annotations", 0, "image_id", 3), r"annotations\[0\] has the image_id 3, but one of the ids in 'images'"),
        (put("annotations", 1, "image_id", 2), r"annotations\[1\] has the image_id 2, .* each once, is expected"),
        (drop("annotations", 0, "file_name"), r"annotations\[0\] has the file_name None, but a PNG below LABELS"),
        (drop("annotations", 0, "segments_info"), r"annotations\[0\] has no list 'segments_info'"),
        (put("annotations", 0, "segments_info", 1, "id", 300), r"a segment of id 300, but .* each once"),
        (
            put("annotations", 0, "segments_info", 1, "id", 0),
            r"of id 0, but whole numbers from 1 to 16777215",
        ),
        (
            put("annotations", 0, "segments_info", 1, "category_id", 1),
            r"segment 7, has the category_id 1, but one in 'categories' is expected",
        ),
        (put("annotations", []), "'annotations' is empty, but at least one is expected"),
    ],
)
def test_bad_panoptic(change: Callable[[Json], None], message: str, tmp_path: Path) -> None:
    data = panoptic_json()
    change(data)
    write_panoptic(tmp_path, data)
    with pytest.raises(ConfigError, match=message):
        register_datasets([PANOPTIC], tmp_path)


def test_a_panoptic_png_that_is_missing(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic_json())
    records = read(PANOPTIC, tmp_path)
    (tmp_path / "pan/labels/2.png").unlink()
    (problem,) = check_records("x_panoptic", records, MetadataCatalog.get("x_panoptic"), max_images=-1)
    assert problem.endswith("pan/labels/2.png does not exist.")


# --- LVIS -----------------------------------------------------------------------------------------------------------


def lvis_json() -> Json:
    data = coco_json()
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [7], "not_exhaustive_category_ids": []}
    for item, often in zip(data["categories"], "rf", strict=True):
        item["frequency"] = often
    return data


def write_lvis(root: Path, data: Json) -> None:
    for name in ("a.jpg", "b.jpg"):
        save_image(root / "lvis/train2017" / name)
    (root / "lvis/a.json").write_text(json.dumps(data))


def test_lvis_equals_coco_but_for_its_own_lists(tmp_path: Path) -> None:
    write_lvis(tmp_path, lvis_json())
    write_coco(tmp_path, coco_json())
    records, expected = read(LVIS, tmp_path), read(COCO_SPEC, tmp_path)
    metadata = MetadataCatalog.get("x_lvis")
    assert metadata.thing_classes == MetadataCatalog.get("x_coco").thing_classes
    assert check_records("x_lvis", records, metadata, max_images=-1) == []
    assert [record["file_name"] for record in records] == [f"{tmp_path}/lvis/train2017/{n}.jpg" for n in "ab"]
    for record, other in zip(records, copy.deepcopy(expected), strict=True):
        assert record.pop("neg_category_ids") == [7]
        assert record.pop("not_exhaustive_category_ids") == []
        for item in other["annotations"]:
            del item["iscrowd"]  # which LVIS does not have
        assert {**record, "file_name": ""} == {**other, "file_name": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("images", 1, "neg_category_ids"), r"images\[1\] has the neg_category_ids None, but .* use FORMAT coco"),
        (put("images", 0, "not_exhaustive_category_ids", [1]), r"not_exhaustive_category_ids \[1\], but a list of ids"),
        (drop("categories", 0, "frequency"), r"categories\[0\] has the frequency None, but r, c or f"),
        (drop("images", 0, "coco_url"), r"images\[0\] \(id 2\) has the file_name None, but a path below IMAGES"),
        (put("annotations", 0, "category_id", 1), r"has the category_id 1, but one of the ids in 'categories'"),
        (put("annotations", 0, "segmentation", [0, 0, 4, 4, 1, 1]), "neither a list of polygons"),
        (
            put("annotations", 0, "segmentation", [[0, 0, 4, 4, 1]]),
            r"\(id \d+\) has a polygon of 5 numbers, but an even",
        ),
        (
            put("annotations", 0, "segmentation", [[0, 0, 4, 4]]),
            r"has a polygon of 4 numbers, but an even .* at least 6",
        ),
    ],
)
def test_bad_lvis(change: Callable[[Json], None], message: str, tmp_path: Path) -> None:
    data = lvis_json()
    change(data)
    write_lvis(tmp_path, data)
    with pytest.raises(ConfigError, match=message):
        register_datasets([LVIS], tmp_path)


# --- keypoints ------------------------------------------------------------------------------------------------------


def keypoint_json(names: list[str]) -> Json:
    data = coco_json()
    for item in data["categories"]:
        item |= {"keypoints": names, "skeleton": [[1, 2]]}
    data["annotations"][0] |= {"keypoints": [1, 2, 2] * len(names), "num_keypoints": len(names)}
    return data


def test_keypoints_are_in_the_metadata(tmp_path: Path) -> None:
    write_coco(tmp_path, keypoint_json(["nose", "left_eye", "right_eye"]))
    records = read(COCO_SPEC, tmp_path)
    metadata = MetadataCatalog.get("x_coco")
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    assert metadata.keypoint_connection_rules[0][:2] == ("nose", "left_eye")
    assert len(records[0]["annotations"][0]["keypoints"]) == 9


def test_coco_persons_flip_as_in_detectron2() -> None:
    theirs = _get_builtin_metadata("coco_person")
    assert {frozenset(pair) for pair in flip_map(theirs["keypoint_names"])} == {
        frozenset(pair) for pair in theirs["keypoint_flip_map"]
    }


@pytest.mark.parametrize(
    "pair",
    [
        ("LeftEye", "RightEye"),
        ("eyeLeft", "eyeRight"),
        ("leftShoulder", "rightShoulder"),
        ("LEye", "REye"),
        ("EyeL", "EyeR"),
        ("l_eye", "r_eye"),
        ("LEFT EYE", "RIGHT EYE"),
        ("eye.l", "eye.r"),
    ],
)
def test_sides_however_they_are_written(pair: tuple[str, str]) -> None:
    assert flip_map(["nose", *pair, "lip", "rip"]) == [pair]


def test_letters_beside_a_word_for_a_side_are_left() -> None:
    assert set(flip_map(["left_RV", "right_RV", "left_LV", "right_LV"])) == {
        ("left_RV", "right_RV"),
        ("left_LV", "right_LV"),
    }
    assert flip_map(["left_l", "right_r"]) == [("left_l", "right_r")]


def test_keypoints_of_which_none_swap_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path, keypoint_json(["nose", "tip"]))
    register_datasets([COCO_SPEC], tmp_path)
    assert "none swap in a mirrored image: nose, tip" in caplog.text


NAMES = st.lists(
    st.from_regex(r"(l|r|left|Right|R|lEft)?_?(ear|Eye|tail)_?(left|R|Right)?", fullmatch=True), unique=True
)


@given(NAMES)
def test_flipping_twice_changes_nothing(names: list[str]) -> None:
    """Detectron2 looks both ways in the map, so each name may be in it once."""
    ends = [name for pair in flip_map(names) for name in pair]
    assert len(ends) == len(set(ends))
    assert set(ends) <= set(names)


def test_classes_with_different_keypoints_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = keypoint_json(["a", "b"])
    data["categories"][1]["keypoints"] = ["a", "c"]
    write_coco(tmp_path, data)
    register_datasets([COCO_SPEC], tmp_path)
    assert "keypoint_names" not in MetadataCatalog.get("x_coco").as_dict()
    assert "keypoints cannot be used, as all classes need the same ones" in caplog.text


def test_a_wrong_number_of_keypoints(tmp_path: Path) -> None:
    data = keypoint_json(["a", "b"])
    data["annotations"][0]["keypoints"] = [1, 2, 2]
    write_coco(tmp_path, data)
    with pytest.raises(ConfigError, match="has 3 numbers of keypoints, but 3 for each of the 2 of its category"):
        register_datasets([COCO_SPEC], tmp_path)


# --- one format given as another ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        (PANOPTIC, coco_json(), r"no category has 'isthing', so this is no panoptic json. .* FORMAT coco."),
        (LVIS, coco_json(), r"no image has 'neg_category_ids', so this is no LVIS json. Use FORMAT coco."),
        (COCO_SPEC, panoptic_json(), r"holds 'segments_info', so this is a panoptic json. Use FORMAT coco_panoptic."),
    ],
    ids=lambda value: getattr(value, "format", ""),
)
def test_another_kind_of_json_is_one_problem(spec: DatasetSpec, data: Json, message: str, tmp_path: Path) -> None:
    write_panoptic(tmp_path, data)
    write_lvis(tmp_path, data)
    write_coco(tmp_path, data)
    with pytest.raises(ConfigError, match=message) as caught:
        register_datasets([spec], tmp_path)
    assert len(caught.value.problems) == 1
