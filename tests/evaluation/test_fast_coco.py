"""hotcoco's counting against pycocotools', on random data sets with ties, crowds and empty images."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from xlearner_d2.evaluation import build_evaluator, fast_coco

SIZE, CLASSES, KEYPOINTS = 64, 3, 17
Register = Callable[..., str]


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Register]:
    """Register COCO annotations, and forget them after the test."""
    names = []

    def add(content: dict[str, Any]) -> str:
        name = f"test_fast_coco_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        register_coco_instances(name, {}, str(tmp_path / f"{name}.json"), str(tmp_path))
        ids = {10 * (index + 1): index for index in range(CLASSES)}
        MetadataCatalog.get(name).set(
            thing_classes=["cat", "dog", "eel"], thing_dataset_id_to_contiguous_id=ids, evaluator_type="coco"
        )
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def random_box(rng: np.random.Generator) -> list[float]:
    """x, y, width, height; small, medium or large as COCO has it."""
    width, height = rng.integers(2, SIZE // 2, 2)
    return [float(value) for value in (*rng.integers(0, SIZE // 2, 2), width, height)]


def annotation(rng: np.random.Generator, number: int, image: int) -> dict[str, Any]:
    x, y, width, height = box = random_box(rng)
    crowd = int(rng.random() < 0.1)
    outline: Any = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    if crowd:
        outline = pycocotools.mask.frPyObjects(outline, SIZE, SIZE)[0]
        outline["counts"] = outline["counts"].decode()
    points = np.column_stack([rng.integers(0, SIZE, (KEYPOINTS, 2)), rng.integers(0, 3, KEYPOINTS)])
    found = {"id": number, "image_id": image, "category_id": int(10 * rng.integers(1, CLASSES + 1)), "bbox": box}
    found |= {"area": width * height, "iscrowd": crowd, "segmentation": outline}
    return found | {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}


def random_truth(rng: np.random.Generator, *, images: int = 12) -> dict[str, Any]:
    annotations = [annotation(rng, 0, image) for image in range(images) for _ in range(rng.integers(0, 5))]
    return {
        "info": {"year": None},
        "licenses": None,
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE} for i in range(images)],
        "categories": [{"id": 10 * (i + 1), "name": str(i), "supercategory": None} for i in range(CLASSES)],
        "annotations": [{**found, "id": number + 1} for number, found in enumerate(annotations)],
    }


def predictions(rng: np.random.Generator, truth: dict[str, Any], *, masks: bool, keypoints: bool) -> list[Instances]:
    """Labelled boxes, some moved or of another class, and others of nothing; coarse scores, so that many are alike."""
    found = []
    for image in truth["images"]:
        boxes = [[float(v) for v in a["bbox"]] for a in truth["annotations"] if a["image_id"] == image["id"]]
        classes = [a["category_id"] // 10 - 1 for a in truth["annotations"] if a["image_id"] == image["id"]]
        for box in boxes:
            box[int(rng.integers(4))] += float(rng.integers(0, 6))
        boxes += [random_box(rng) for _ in range(rng.integers(0, 4))]
        classes += [int(rng.integers(CLASSES)) for _ in range(len(boxes) - len(classes))]
        output = Instances((SIZE, SIZE))
        xywh = torch.tensor(boxes).reshape(-1, 4)
        output.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        output.pred_classes = torch.tensor(classes, dtype=torch.int64)
        output.scores = torch.from_numpy(rng.integers(1, 5, len(boxes)) / 4)
        if masks:
            rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
            x, y, width, height = xywh.T[:, :, None, None]
            output.pred_masks = (columns >= x) & (columns < x + width) & (rows >= y) & (rows < y + height)
        if keypoints:
            output.pred_keypoints = torch.from_numpy(rng.integers(0, SIZE, (len(boxes), KEYPOINTS, 3))).float()
        found.append(output)
    return found


def evaluate(name: str, outputs: list[Instances], *, output_dir: str | None = None) -> dict[str, dict[str, float]]:
    evaluator = build_evaluator(name, output_dir=output_dir)
    evaluator.reset()
    for image, output in enumerate(outputs):
        evaluator.process([{"image_id": image}], [{"instances": output}])
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("masks", "keypoints"), [(True, False), (False, True)])
def test_results_are_those_of_pycocotools(
    register: Register, monkeypatch: pytest.MonkeyPatch, caplog: Any, seed: int, masks: bool, keypoints: bool
) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    name, outputs = register(truth), predictions(rng, truth, masks=masks, keypoints=keypoints)
    fast = evaluate(name, outputs)
    assert "pycocotools" not in caplog.text
    monkeypatch.setattr(fast_coco, "hotcoco", None)
    slow = evaluate(name, outputs)
    assert "hotcoco is not installed: pycocotools evaluates" in caplog.text
    assert fast.keys() == slow.keys() == {"bbox", "segm" if masks else "keypoints"}
    assert 0 < fast["bbox"]["AP"] < 100
    assert {"AP-cat", "AP-dog", "AP-eel"} < fast["bbox"].keys()
    for task, expected in slow.items():
        np.testing.assert_equal(fast[task], expected)  # NaN where it is NaN


def test_file_of_results_has_the_data_sets_own_category_ids(register: Register, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    name = register(truth)
    evaluate(name, predictions(rng, truth, masks=False, keypoints=False), output_dir=str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / name / "coco_instances_results.json").read_text())
    assert {found["category_id"] for found in written} == {10, 20, 30}


@pytest.mark.parametrize("field", ["id", "image_id"])
def test_what_hotcoco_refuses_is_left_to_pycocotools(register: Register, caplog: Any, field: str) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    truth["annotations"][0][field] = -1  # pycocotools takes any hashable
    found = evaluate(register(truth), predictions(rng, truth, masks=False, keypoints=False))
    assert found["bbox"]["AP"] > 0
    assert "as hotcoco cannot read it: annotations[0]" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_a_class_that_the_data_set_lacks(register: Register) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    outputs = predictions(rng, truth, masks=False, keypoints=False)
    outputs[0].pred_classes[:] = 7
    with pytest.raises(ValueError, match="has 3 classes, but class 7 was predicted"):
        evaluate(register(truth), outputs)


def test_keypoints_that_do_not_agree(register: Register) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    outputs = predictions(rng, truth, masks=False, keypoints=True)
    for output in outputs:
        output.pred_keypoints = output.pred_keypoints[:, :5]
    with pytest.raises(ValueError, match=r"5 keypoints are predicted and 17 labelled.*KEYPOINT_OKS_SIGMAS has 17"):
        evaluate(register(truth), outputs)
