"""Accuracy against scikit-learn, in one process and in two."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from xlearner_d2.evaluation import ClassificationEvaluator, main_metric

NUM_IMAGES, NUM_CLASSES = 61, 7


def _names(count):
    return [f"class{index}" for index in range(count)]


def _data(num_classes=NUM_CLASSES, num_images=NUM_IMAGES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    scores = torch.randn(num_images, num_classes, generator=generator)
    scores[torch.arange(num_images), labels] += 1
    return labels, scores


def _run(evaluator, labels, scores, indices, batch_size=8):
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        inputs = [{"image_id": int(i), "category_id": int(labels[i])} for i in part]
        evaluator.process(inputs, [{"scores": scores[i]} for i in part])
    return evaluator.evaluate()


@pytest.mark.parametrize("num_classes", [2, 4, 5, 7, 30])
def test_agrees_with_sklearn(num_classes):
    labels, scores = _data(num_classes, 300)
    metrics = _run(ClassificationEvaluator(class_names=_names(num_classes)), labels, scores, range(len(labels)))
    k = min(5, num_classes)
    classes = np.arange(num_classes)
    expected = {
        "top1": accuracy_score(labels, scores.argmax(dim=1)),
        "mean_class_acc": balanced_accuracy_score(labels, scores.argmax(dim=1)),
        # scikit-learn's top-k of two classes wants one column only.
        "top5": 1.0 if k == num_classes else top_k_accuracy_score(labels, scores.numpy(), k=k, labels=classes),
    }
    assert metrics["classification"] == pytest.approx({key: 100 * value for key, value in expected.items()})
    assert main_metric(metrics) == {"classification/top1": metrics["classification"]["top1"]}


def _worker(rank, folder):
    torch.set_num_threads(1)  # a forked process has lost the parent's thread pool
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    labels, scores = _data()
    # Both workers get image 30, and the second one gets image 31 twice, as a sampler that pads may do.
    indices = list(range(31)) if rank == 0 else [30, 31, *range(31, NUM_IMAGES)]
    results = _run(ClassificationEvaluator(class_names=_names(NUM_CLASSES)), labels, scores, indices)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_workers_agree_with_one(tmp_path):
    mp.start_processes(_worker, args=(tmp_path,), nprocs=2, start_method="fork")
    labels, scores = _data()
    single = _run(ClassificationEvaluator(class_names=_names(NUM_CLASSES)), labels, scores, range(len(labels)))
    assert json.loads((tmp_path / "0.json").read_text()) == single
    assert json.loads((tmp_path / "1.json").read_text()) == {}


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 20), scale=st.floats(0.1, 10))
def test_only_the_order_of_scores_matters(seed, batch_size, scale):
    labels, scores = _data(seed=seed, num_images=20)
    evaluator = ClassificationEvaluator(class_names=_names(NUM_CLASSES))
    first = _run(evaluator, labels, scores, range(20))
    evaluator.reset()
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert _run(evaluator, labels, (scale * scores).double().softmax(dim=1), shuffled, batch_size) == first


def test_constant_scores_do_not_look_good():
    labels = torch.arange(10)
    metrics = _run(ClassificationEvaluator(class_names=_names(10)), labels, torch.zeros(10, 10), range(10))
    assert metrics["classification"] == pytest.approx({"top1": 10, "top5": 50, "mean_class_acc": 10})


def test_nan_counts_as_wrong(caplog):
    labels, scores = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, float("nan")]])
    metrics = _run(ClassificationEvaluator(class_names=_names(2)), labels, scores, range(2))
    assert metrics["classification"] == {"top1": 50, "top5": 50, "mean_class_acc": 50}
    assert "1 of 2 images got NaN scores" in caplog.text


def test_images_without_any_key_all_count():
    evaluator = ClassificationEvaluator(class_names=_names(2))
    evaluator.process([{"category_id": 0}] * 3, [{"scores": torch.tensor([1.0, 0.0])}] * 3)
    evaluator.process([{"category_id": 1}], [{"scores": torch.tensor([1.0, 0.0])}])
    assert evaluator.evaluate()["classification"]["top1"] == 75


def test_no_image_gives_no_result(caplog):
    evaluator = ClassificationEvaluator(class_names=_names(3))
    evaluator.process([], [])
    assert evaluator.evaluate() == {}
    assert "no predictions" in caplog.text


def test_reset_forgets():
    evaluator = ClassificationEvaluator(class_names=_names(2))
    evaluator.process([{"image_id": 0, "category_id": 0}], [{"scores": torch.tensor([0.0, 1.0])}])
    evaluator.reset()
    evaluator.process([{"image_id": 1, "category_id": 1}], [{"scores": torch.tensor([0.0, 1.0])}])
    assert evaluator.evaluate()["classification"]["top1"] == 100


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"file_name": "a.jpg"}, r"lacks category_id.*it has file_name"),
        ({"category_id": 3}, "category_id is 3, but 0 to 2 is expected"),
        ({"category_id": -1}, "category_id is -1"),
    ],
)
def test_unusable_label(item, message):
    with pytest.raises(ValueError, match=message):
        ClassificationEvaluator(class_names=_names(3)).process([item], [{"scores": torch.zeros(3)}])


def test_wrong_number_of_scores():
    with pytest.raises(ValueError, match=r"scores of shape \(1, 5\).*3 classes.*NUM_CLASSES"):
        ClassificationEvaluator(class_names=_names(3)).process([{"category_id": 0}], [{"scores": torch.zeros(5)}])
