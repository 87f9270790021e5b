"""Each kind of evaluator on tiny hand-made data, with empty and perfect predictions."""

import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import SemSegEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from sklearn.metrics import jaccard_score

from xlearner_d2.evaluation import ClassificationEvaluator, build_evaluator, main_metric

# Detectron2 turns tensors into arrays in a way that numpy 2 is going to refuse.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE = 32
BOXES = [[2.0, 3.0, 12.0, 10.0], [15.0, 15.0, 10.0, 12.0]]  # x, y, width, height


@pytest.fixture
def register():
    """Register a data set under a new name and forget it after the test."""
    names = []
    counter = itertools.count()

    def add(function, **metadata):
        name = f"test_evaluation_{next(counter)}"
        names.append(name)
        function(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _instances(boxes, classes, *, masks=False):
    instances = Instances((SIZE, SIZE))
    xywh = torch.tensor(boxes).reshape(-1, 4)
    instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
    instances.scores = torch.ones(len(boxes))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        instances.pred_masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
        for mask, (x, y, width, height) in zip(instances.pred_masks, boxes, strict=True):
            mask[int(y) : int(y + height), int(x) : int(x + width)] = True
    return instances


def _rectangle(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _coco(tmp_path, register, *, masks="all", boxes=BOXES):
    annotations = []
    for number, box in enumerate(boxes):
        annotation = {"id": number + 1, "image_id": 7, "category_id": 10 * (number + 1), "bbox": box}
        if masks == "all" or (masks == "some" and number == 0):
            annotation["segmentation"] = _rectangle(*box)
        annotations.append(annotation)
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": SIZE, "width": SIZE}],
        "categories": [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}],
        "annotations": annotations,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = register(lambda name: register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path)))
    MetadataCatalog.get(name).set(
        thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={10: 0, 20: 1}, evaluator_type="coco"
    )
    return name


def _evaluate(name, output_dir, instances):
    evaluator = build_evaluator(name, output_dir=output_dir)
    evaluator.reset()
    evaluator.process([{"image_id": 7, "file_name": "a.png"}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("masks", [False, True])
def test_coco_perfect_predictions(tmp_path, register, masks, capsys, caplog):
    name = _coco(tmp_path, register)
    capsys.readouterr()
    with caplog.at_level(logging.DEBUG, logger="xlearner_d2"):
        results = _evaluate(name, str(tmp_path / "out"), _instances(BOXES, [0, 1], masks=masks))
    assert main_metric(results) == pytest.approx({"bbox/AP": 100, "segm/AP": 100} if masks else {"bbox/AP": 100})
    assert capsys.readouterr().out == ""
    assert "Average Precision" in caplog.text
    assert (tmp_path / "out" / name / "coco_instances_results.json").is_file()


@pytest.mark.parametrize("masks", [False, True])
def test_coco_finding_nothing_is_ap_zero(tmp_path, register, masks, capsys):
    name = _coco(tmp_path, register)
    capsys.readouterr()
    results = _evaluate(name, None, _instances([], [], masks=masks))
    assert main_metric(results) == ({"bbox/AP": 0, "segm/AP": 0} if masks else {"bbox/AP": 0})
    assert results["bbox"]["AP-cat"] == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("predicted", [0, 1])
def test_coco_without_objects_is_nan(tmp_path, register, predicted):
    results = _evaluate(_coco(tmp_path, register, boxes=[]), None, _instances(BOXES[:predicted], [0] * predicted))
    assert math.isnan(main_metric(results)["bbox/AP"])


@pytest.mark.parametrize("masks", ["none", "some"])
def test_masks_are_not_scored_where_annotations_lack_them(tmp_path, register, masks, caplog):
    results = _evaluate(_coco(tmp_path, register, masks=masks), None, _instances(BOXES, [0, 1], masks=True))
    assert main_metric(results) == pytest.approx({"bbox/AP": 100})
    assert "Masks are not scored" in caplog.text


def test_coco_without_predictions_is_empty(tmp_path, register):
    evaluator = build_evaluator(_coco(tmp_path, register), output_dir=None)
    evaluator.reset()
    assert main_metric(evaluator.evaluate()) == {}


def _voc(tmp_path, register, *, year=2012, extra="<pose>x</pose>", difficult=0):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\nb\n")
    for stem in "ab":
        (tmp_path / f"Annotations/{stem}.xml").write_text(
            f"<annotation><object><name>cat</name>{extra}<truncated>0</truncated><difficult>{difficult}</difficult>"
            "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>14</xmax><ymax>13</ymax></bndbox></object></annotation>"
        )
    classes = ["dog", "cat", "cow"]
    return register(
        lambda name: register_pascal_voc(name, str(tmp_path), "val", year, classes), evaluator_type="pascal_voc"
    )


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize(("found", "expected"), [([], 0), ([1], 100), ([1, 0], 100)])
def test_voc_averages_over_present_classes(tmp_path, register, year, found, expected):
    evaluator = build_evaluator(_voc(tmp_path, register, year=year), output_dir=str(tmp_path / "out"))
    for _ in range(2):  # evaluating twice gives the same
        evaluator.reset()
        output = _instances([[2.0, 3.0, 12.0, 10.0]] * len(found), found)
        evaluator.process([{"image_id": "a"}, {"image_id": "b"}], [{"instances": output}] * 2)
        # A dog where there is none does not touch the mean; Detectron2 alone gives NaN or a third of it.
        assert main_metric(evaluator.evaluate()) == pytest.approx({"bbox/AP": expected})


def test_voc_without_countable_object(tmp_path, register, caplog):
    evaluator = build_evaluator(_voc(tmp_path, register, difficult=1), output_dir=None)
    evaluator.reset()
    assert evaluator.evaluate() == {}
    assert "AP is undefined" in caplog.text


def test_voc_incomplete_annotation(tmp_path, register):
    name = _voc(tmp_path, register, extra="")
    with pytest.raises(ValueError, match=r"a\.xml: Pascal VOC evaluation needs name, pose, truncated, difficult"):
        build_evaluator(name, output_dir=None)


def test_voc_empty_field(tmp_path, register):
    name = _voc(tmp_path, register, extra="<pose>Left</pose><truncated/>")
    with pytest.raises(ValueError, match=r"a\.xml: Pascal VOC evaluation needs name, pose, truncated, difficult"):
        build_evaluator(name, output_dir=None)


def _sem_seg(tmp_path, register, labels, *, ignore=255):
    Image.fromarray(labels).save(tmp_path / "a_label.png")
    records = [{"file_name": "a.png", "sem_seg_file_name": str(tmp_path / "a_label.png"), "image_id": 0}]
    return register(
        lambda name: DatasetCatalog.register(name, lambda: records),
        evaluator_type="sem_seg",
        stuff_classes=["sky", "road", "tree"],
        ignore_label=ignore,
    )


def _evaluate_labels(name, predicted):
    evaluator = build_evaluator(name, output_dir=None)
    evaluator.reset()
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), 3).permute(2, 0, 1).float()
    evaluator.process([{"file_name": "a.png"}], [{"sem_seg": logits}])
    return evaluator.evaluate()


def test_sem_seg_agrees_with_sklearn(tmp_path, register):
    generator = np.random.default_rng(0)
    labels, predicted = (generator.integers(0, 3, (SIZE, SIZE)).astype(np.uint8) for _ in range(2))
    labels[:3] = 255
    results = _evaluate_labels(_sem_seg(tmp_path, register, labels), predicted)
    expected = jaccard_score(labels[3:].ravel(), predicted[3:].ravel(), average="macro")
    assert main_metric(results) == pytest.approx({"sem_seg/mIoU": 100 * expected})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sem_seg_counts_what_detectron2_counts(tmp_path, register, dtype):
    """Also where classes have equal scores, of which the first counts."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (3, SIZE, SIZE), generator=generator).to(dtype)
    name = _sem_seg(tmp_path, register, np.zeros((SIZE, SIZE), dtype=np.uint8))
    found = []
    stock = SemSegEvaluator(name, sem_seg_loading_fn=lambda path, dtype: np.array(Image.open(path), dtype=dtype))
    for evaluator in (build_evaluator(name, output_dir=None), stock):
        evaluator.reset()
        evaluator.process([{"file_name": "a.png"}], [{"sem_seg": scores}])
        found.append(evaluator.evaluate()["sem_seg"])
    np.testing.assert_equal(found[0], found[1])  # classes that are not there have no accuracy


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sem_seg_without_labels_is_nan(tmp_path, register):
    labels = np.full((SIZE, SIZE), 255, dtype=np.uint8)
    results = _evaluate_labels(_sem_seg(tmp_path, register, labels), np.zeros_like(labels))
    assert math.isnan(main_metric(results)["sem_seg/mIoU"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((SIZE, SIZE), 3, dtype=np.uint8), r"has the label 3; expected: 0 to 2, or 255 to ignore"),
        (np.zeros((SIZE, SIZE, 3), dtype=np.uint8), "a PNG of one channel is expected"),
    ],
)
def test_sem_seg_impossible_labels(tmp_path, register, labels, message):
    with pytest.raises(ValueError, match=message):
        _evaluate_labels(_sem_seg(tmp_path, register, labels), np.zeros((SIZE, SIZE), dtype=np.uint8))


def test_classification(register):
    name = register(
        lambda name: DatasetCatalog.register(name, list), evaluator_type="classification", classes=["cat", "dog"]
    )
    assert isinstance(build_evaluator(name, output_dir=None), ClassificationEvaluator)


@pytest.mark.parametrize("metadata", [{}, {"evaluator_type": "cityscapes_instance"}])
def test_unknown_type_lists_the_known_ones(register, metadata):
    name = register(lambda name: DatasetCatalog.register(name, list), **metadata)
    with pytest.raises(ValueError, match=r"evaluator_type.*coco, lvis, pascal_voc, sem_seg, classification"):
        build_evaluator(name, output_dir=None)


def test_unregistered_data_set():
    with pytest.raises(ValueError, match="There is no data set 'nowhere'"):
        build_evaluator("nowhere", output_dir=None)


def test_main_metric_takes_what_is_there():
    assert main_metric({}) == {}
    assert main_metric({"bbox": {"AP": 1.0, "AP50": 2.0}, "other": {"AP": 3.0}}) == {"bbox/AP": 1.0}
