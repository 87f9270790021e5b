"""Evaluators of several labels, depth, panoptic and keypoints: laws, and oracles that count in another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.evaluation.build import build_evaluator, check_evaluation, main_metric
from xlearner_d2.evaluation.depth import DepthEvaluator, depth_metrics
from xlearner_d2.evaluation.multi_label import MultiLabelEvaluator, mean_average_precision
from xlearner_d2.evaluation.trivial import trivial_metrics
from xlearner_d2.extensions import id2rgb
from xlearner_d2.specs import DatasetSpec

NAMES = ["a", "b", "c"]


def multi_label(labels: list[list[int]], scores: list[list[float]]) -> dict[str, Any]:
    evaluator = MultiLabelEvaluator(class_names=NAMES)
    inputs = [{"category_ids": found, "file_name": str(number)} for number, found in enumerate(labels)]
    outputs = [{"label_scores": torch.tensor(row)} for row in scores]
    for item, output in zip(inputs, outputs, strict=True):
        evaluator.process([item], [output])
    evaluator.process(inputs[:1], outputs[:1])  # a sampler may pad
    return evaluator.evaluate()


def test_average_precision_by_hand() -> None:
    """Class a: positives at ranks 1 and 3: (1 + 2/3) / 2; class b: at rank 2: 1/2; class c does not occur."""
    found = multi_label([[0], [1], [0]], [[0.9, 0.8, 0.1], [0.5, 0.4, 0.1], [0.2, 0.1, 0.1]])
    assert found["multi_label"]["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2)


@given(arrays(np.int64, (6, 3), elements=st.integers(0, 1)))
def test_scores_that_are_the_labels_are_perfect(labels: np.ndarray) -> None:
    value = mean_average_precision(labels, labels.astype(float))
    assert value == pytest.approx(100) if labels.any() else np.isnan(value)


def test_nan_score_ranks_last() -> None:
    found = multi_label([[0], []], [[float("nan"), 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert found["multi_label"]["mAP"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("item", "scores", "match"),
    [
        ({"file_name": "x"}, [0.0] * 3, r"lacks category_ids, .*it has file_name"),
        ({"category_ids": [3]}, [0.0] * 3, "category_ids has 3, but 0 to 2"),
        ({"category_ids": [0]}, [0.0] * 2, r"label_scores of shape \(2,\) for 3 classes"),
    ],
)
def test_unusable_labels_or_scores(item: dict[str, Any], scores: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MultiLabelEvaluator(class_names=NAMES).process([item], [{"label_scores": torch.tensor(scores)}])


def register(name: str, records: list[dict[str, Any]], **metadata: Any) -> str:
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)
    return name


@given(st.lists(st.lists(st.integers(0, 2)), min_size=1, max_size=8))
def test_trivial_labels_equal_constant_scores(labels: list[list[int]]) -> None:
    records = [{"file_name": str(number), "category_ids": found} for number, found in enumerate(labels)]
    name = register("trivial_labels", records, classes=NAMES, evaluator_type="multi_label")
    if not any(labels):
        with pytest.raises(ValueError, match="no label in the test data"):
            trivial_metrics(name, train_names=[name])
        return
    evaluator = build_evaluator(name, output_dir=None)
    evaluator.process(records, [{"label_scores": torch.tensor([0.3, 0.5, 0.2])}] * len(records))
    assert main_metric(evaluator.evaluate()) == pytest.approx(trivial_metrics(name, train_names=[name]))


def depth_record(path: Path, depth: np.ndarray) -> dict[str, Any]:
    np.save(path, depth)
    return {"file_name": f"{path}.jpg", "depth_file_name": str(path), "depth_scale": 1.0}


def test_depth_by_hand() -> None:
    truth = np.array([[1.0, 2.0], [4.0, 0.0]])
    found = depth_metrics(np.array([[1.2, 1.0], [4.0, 7.0]]), truth)
    assert found == pytest.approx(
        {"delta1": 100 * 2 / 3, "abs_rel": (0.2 + 0.5) / 3, "rmse": np.sqrt((0.2**2 + 1) / 3)}
    )


@given(arrays(np.float32, (3, 4), elements=st.floats(0.125, 128, width=32)), st.floats(0.5, 2.0))
def test_depth_off_by_one_factor(truth: np.ndarray, factor: float) -> None:
    found = depth_metrics(truth * factor, truth)
    assert found["abs_rel"] == pytest.approx(abs(factor - 1), abs=1e-5)
    if abs(max(factor, 1 / factor) - 1.25) > 1e-3:
        assert found["delta1"] == (100 if max(factor, 1 / factor) < 1.25 else 0)


def test_depth_is_the_mean_over_images(tmp_path: Path) -> None:
    maps = [np.full((2, 3), 1.0), np.array([[2.0, 0, 0], [0, 0, 0]]), np.zeros((2, 3))]
    records = [depth_record(tmp_path / f"{number}.npy", depth) for number, depth in enumerate(maps)]
    evaluator = DepthEvaluator()
    evaluator.process(records, [{"depth": torch.ones(2, 3)}] * 3)
    evaluator.process(records[:1], [{"depth": torch.ones(2, 3)}])
    assert evaluator.evaluate()["depth"]["delta1"] == pytest.approx(50)
    name = register("trivial_depth", records[:2], evaluator_type="depth")
    assert trivial_metrics(name, train_names=[name]) == {"depth/delta1": 0.0}  # the median, 1.5 m, fits neither
    with pytest.raises(ValueError, match=r"depth of shape \(3, 2\) .*\(2, 3\) is expected"):
        evaluator.process(records, [{"depth": torch.ones(3, 2)}] * 3)


def test_trivial_depth_needs_a_depth(tmp_path: Path) -> None:
    name = register("no_depth", [depth_record(tmp_path / "0.npy", np.zeros((2, 2)))], evaluator_type="depth")
    with pytest.raises(ValueError, match="no known depth in the training data"):
        trivial_metrics(name, train_names=[name])


@pytest.fixture
def panoptic(tmp_path: Path) -> str:
    """One image: a thing of category 7 in its left half, stuff of category 3 in its right half."""
    ids = np.full((8, 8), 5)
    ids[:, :4] = 60000
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images/0.png")
    Image.fromarray(id2rgb(ids)).save(tmp_path / "labels/0.png")
    common = {"iscrowd": 0, "bbox": [0, 0, 4, 8], "area": 32}
    infos = [{"id": 60000, "category_id": 7, **common}, {"id": 5, "category_id": 3, **common}]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 8, "width": 8}],
        "annotations": [{"image_id": 1, "file_name": "0.png", "segments_info": infos}],
        "categories": [{"id": 7, "name": "thing", "isthing": 1}, {"id": 3, "name": "stuff", "isthing": 0}],
    }
    (tmp_path / "json").write_text(json.dumps(content))
    keys = {"images": "images", "annotations": "json", "labels": "labels"}
    register_datasets([DatasetSpec(name="eval_panoptic", format="coco_panoptic", **keys)], tmp_path)
    return "eval_panoptic"


@pytest.mark.parametrize(("columns", "wanted"), [(4, 100.0), (3, 100 * (3 / 4 + 4 / 5) / 2), (8, 0.0)])
def test_panoptic_quality_by_hand(panoptic: str, columns: int, wanted: float) -> None:
    """A segment is found when it overlaps by more than a half; then the overlap (IoU) counts."""
    evaluator = build_evaluator(panoptic, output_dir=None)
    evaluator.reset()
    ids = torch.full((8, 8), 2, dtype=torch.int32)
    ids[:, :columns] = 1
    infos = [{"id": 1, "category_id": 1, "isthing": True}, {"id": 2, "category_id": 0, "isthing": False}]
    infos = [info for info in infos if (ids == info["id"]).any()]
    evaluator.process(DatasetCatalog.get(panoptic), [{"panoptic_seg": (ids, infos)}])
    assert main_metric(evaluator.evaluate()) == {"panoptic_seg/PQ": pytest.approx(wanted)}


def test_panoptic_images_of_one_name_in_two_folders(panoptic: str, tmp_path: Path) -> None:
    """Each is found as it is, so both have to be scored by their own labels."""
    content = json.loads((tmp_path / "json").read_text())
    (image,), (annotation,) = content["images"], content["annotations"]
    content["images"] = [{**image, "id": ord(folder), "file_name": f"{folder}/0.png"} for folder in "ab"]
    content["annotations"] = []
    for folder, columns in (("a", 4), ("b", 6)):
        for place in ("images", "labels"):
            (tmp_path / place / folder).mkdir()
        ids = np.full((8, 8), 5)
        ids[:, :columns] = 60000
        Image.fromarray(id2rgb(ids)).save(tmp_path / "labels" / folder / "0.png")
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / folder / "0.png")
        thing, stuff = annotation["segments_info"]
        segments = [{**thing, "area": 8 * columns}, {**stuff, "area": 8 * (8 - columns)}]
        where = {"image_id": ord(folder), "file_name": f"{folder}/0.png"}
        content["annotations"].append({**where, "segments_info": segments})
    (tmp_path / "twice").write_text(json.dumps(content))
    keys = {"images": "images", "annotations": "twice", "labels": "labels"}
    register_datasets([DatasetSpec(name="eval_folders", format="coco_panoptic", **keys)], tmp_path)
    evaluator = build_evaluator("eval_folders", output_dir=None)
    evaluator.reset()
    infos = [{"id": 1, "category_id": 1, "isthing": True}, {"id": 2, "category_id": 0, "isthing": False}]
    found = []
    for columns in (4, 6):
        ids = torch.full((8, 8), 2, dtype=torch.int32)
        ids[:, :columns] = 1
        found.append({"panoptic_seg": (ids, [dict(info) for info in infos])})
    evaluator.process(DatasetCatalog.get("eval_folders"), found)
    assert main_metric(evaluator.evaluate()) == {"panoptic_seg/PQ": pytest.approx(100.0)}


def test_panoptic_images_known_by_text_cannot_be_evaluated(tmp_path: Path) -> None:
    """Training can do with them."""
    records = [{"file_name": "a.png", "image_id": "ADE_1"}]
    name = register("panoptic_text", records, evaluator_type="coco_panoptic_seg")
    with pytest.raises(ValueError, match=r"image ids of the data set 'panoptic_text' are text, but its evaluation"):
        check_evaluation(name)


def keypoint_set(root: Path, names: list[str]) -> str:
    points = [value for number in range(len(names)) for value in (10 + 3 * number, 10, 2)]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 40, 40], "keypoints": points}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 64, "width": 64}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "x", "keypoints": names}],
    }
    (root / "json").write_text(json.dumps(content))
    register_datasets([DatasetSpec(name="eval_points", format="coco", images=".", annotations="json")], root)
    return "eval_points"


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("count", [3, 17])
def test_keypoints_of_any_number_are_scored(tmp_path: Path, count: int, found: bool) -> None:
    name = keypoint_set(tmp_path, [f"p{number}" for number in range(count)])
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "0.png")
    evaluator = build_evaluator(name, output_dir=None)
    evaluator.reset()
    points = torch.tensor([[[10.0 + 3 * number, 10.0, 1.0] for number in range(count)]])
    instances = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[5.0, 5, 45, 45]])), scores=torch.ones(1))
    instances.pred_classes, instances.pred_keypoints = torch.zeros(1, dtype=torch.int64), points
    evaluator.process(DatasetCatalog.get(name), [{"instances": instances if found else instances[:0]}])
    wanted = 100.0 if found else 0.0
    assert main_metric(evaluator.evaluate()) == {
        "bbox/AP": pytest.approx(wanted),
        "keypoints/AP": pytest.approx(wanted),
    }
