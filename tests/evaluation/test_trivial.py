"""The constant predictors, against evaluators and scikit-learn that are fed the same constant."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from sklearn.dummy import DummyClassifier

from xlearner_d2.evaluation import build_evaluator, main_metric, trivial_metrics

# Detectron2 turns tensors into arrays in a way that numpy 2 is going to refuse.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

_counter = itertools.count()


@pytest.fixture
def register():
    names = []

    def add(records, **metadata):
        names.append(f"test_trivial_{next(_counter)}")
        DatasetCatalog.register(names[-1], lambda: records)
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _classified(register, labels):
    records = [{"file_name": f"{i}.png", "image_id": i, "category_id": int(label)} for i, label in enumerate(labels)]
    return register(records, evaluator_type="classification", classes=["a", "b", "c"])


def _segmented(register, tmp_path, maps, prefix):
    records = []
    for number, labels in enumerate(maps):
        file = tmp_path / f"{prefix}{number}.png"
        Image.fromarray(labels).save(file)
        records.append({"file_name": f"{prefix}{number}.jpg", "image_id": number, "sem_seg_file_name": str(file)})
    return register(records, evaluator_type="sem_seg", stuff_classes=["a", "b", "c", "d"], ignore_label=255)


def test_classification_agrees_with_sklearn(register):
    generator = np.random.default_rng(0)
    train, test = generator.choice(3, 50, p=[0.2, 0.5, 0.3]), generator.integers(0, 3, 40)
    names = [_classified(register, labels) for labels in (train[:20], train[20:], test)]
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((50, 1)), train)
    expected = 100 * dummy.score(np.zeros((40, 1)), test)
    assert trivial_metrics(names[2], train_names=names[:2]) == pytest.approx({"classification/top1": expected})


def test_sem_seg_agrees_with_the_evaluator(register, tmp_path):
    generator = np.random.default_rng(0)
    train, test = (generator.choice(3, (2, 16, 20), p=[0.2, 0.2, 0.6]).astype(np.uint8) for _ in range(2))
    train[:, :12] = 255  # ignored pixels are the most frequent, and do not count
    names = [_segmented(register, tmp_path, maps, prefix) for maps, prefix in ((train, "train"), (test, "test"))]
    majority = np.bincount(train[train < 4]).argmax()
    evaluator = build_evaluator(names[1], output_dir=None)
    evaluator.reset()
    logits = torch.zeros(4, 16, 20)
    logits[majority] = 1
    for record in DatasetCatalog.get(names[1]):
        evaluator.process([record], [{"sem_seg": logits}])
    assert trivial_metrics(names[1], train_names=names[:1]) == pytest.approx(main_metric(evaluator.evaluate()))


@pytest.mark.parametrize(
    ("kind", "annotation", "expected"),
    [
        ("coco", {"bbox": [0, 0, 1, 1]}, {"bbox/AP": 0}),
        ("coco", {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]]}, {"bbox/AP": 0, "segm/AP": 0}),
        ("pascal_voc", {"bbox": [0, 0, 1, 1]}, {"bbox/AP": 0}),
    ],
)
def test_detection_is_zero(register, kind, annotation, expected):
    assert trivial_metrics(register([{"annotations": [annotation]}], evaluator_type=kind)) == expected


def test_training_data_is_needed(register):
    with pytest.raises(ValueError, match="train_names is empty"):
        trivial_metrics(_classified(register, [0, 1]))


def test_no_label(register):
    name = _classified(register, [])
    with pytest.raises(ValueError, match="no label in the training data"):
        trivial_metrics(name, train_names=[name])


def test_unknown_type(register):
    with pytest.raises(ValueError, match=r"evaluator_type of the data set .* is 'rotated'"):
        trivial_metrics(register([], evaluator_type="rotated"))
