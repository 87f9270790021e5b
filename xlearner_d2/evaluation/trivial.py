"""What a predictor without learning scores: the floor that every result is read against."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.depth import read_depth
from ..labels import image_labels
from .build import evaluator_type, read_labels
from .depth import depth_metrics, mean_metrics

Record = Mapping[str, Any]


def trivial_metrics(
    dataset_name: str, *, train_names: Sequence[str] = (), head: CfgNode | None = None
) -> dict[str, float]:
    """Metrics of the best constant answer that needs no image, under the keys of :func:`.build.main_metric`.

    Classification answers the most frequent class of the training images, or with several labels the same scores for
    every image; semantic segmentation the most frequent class of the training pixels, everywhere; depth the median of
    the training images' medians, everywhere; detection, instance and panoptic segmentation find nothing.

    Args:
        dataset_name: the registered data set that is evaluated.
        train_names: the data sets with the same label space that the constant is taken from; not used for detection.
        head: as for :func:`.build.build_evaluator`.

    Returns:
        percentages, for example ``{"classification/top1": 11.3}``.

    Raises:
        ValueError: for an unknown ``evaluator_type``, a missing training set, or data without any label.
    """
    kind = evaluator_type(dataset_name, head)
    if kind not in ("coco", "lvis", "pascal_voc", "coco_panoptic_seg", *_CONSTANTS):
        raise ValueError(f"evaluator_type of the data set {dataset_name!r} is {kind!r}; no constant answer is known.")
    if kind == "pascal_voc":
        return {"bbox/AP": 0.0}
    if kind == "coco_panoptic_seg":
        return {"panoptic_seg/PQ": 0.0}
    test = DatasetCatalog.get(dataset_name)
    if kind in ("coco", "lvis"):
        return {f"{part}/AP": 0.0 for part in _coco_parts(test, head)}
    if not train_names:
        raise ValueError(
            f"The constant answer for {dataset_name!r} comes from training data, but train_names is empty."
        )
    train = [record for name in train_names for record in DatasetCatalog.get(name)]
    key, constant = _CONSTANTS[kind]
    return {key: constant(train, test, dataset_name)}


def _coco_parts(test: Sequence[Record], head: CfgNode | None) -> list[str]:
    has_masks = any(item.get("segmentation") for record in test for item in record.get("annotations", ()))
    has_keypoints = head is not None and head.MODEL.KEYPOINT_ON
    return ["bbox", *(["segm"] if has_masks else []), *(["keypoints"] if has_keypoints else [])]


def _total(counts: Iterable[np.ndarray], where: str) -> np.ndarray:
    """How often each class occurs in all parts: [num_classes]."""
    total = functools.reduce(np.add, counts)
    if not total.any():
        raise ValueError(f"There is no label in the {where} data.")
    return total


def _majority_accuracy(train: Sequence[Record], test: Sequence[Record], dataset_name: str) -> float:
    labels = [np.array([record["category_id"] for record in records], dtype=int) for records in (train, test)]
    num_classes = 1 + max(int(part.max(initial=0)) for part in labels)
    train_count, test_count = (
        _total([np.bincount(part, minlength=num_classes)], where)
        for part, where in zip(labels, ("training", "test"), strict=True)
    )
    return 100.0 * float(test_count[train_count.argmax()] / test_count.sum())


def _majority_iou(train: Sequence[Record], test: Sequence[Record], dataset_name: str) -> float:
    meta = MetadataCatalog.get(dataset_name)
    num_classes, ignore_label = len(meta.stuff_classes), meta.ignore_label

    def count(record: Record) -> np.ndarray:
        labels = read_labels(record["sem_seg_file_name"], num_classes=num_classes, ignore_label=ignore_label)
        return np.bincount(labels[labels != ignore_label], minlength=num_classes)

    with ThreadPoolExecutor() as pool:  # all other workers of a run wait for this one
        train_count = _total(pool.map(count, train), "training")
        test_count = _total(pool.map(count, test), "test")
    # Every pixel is predicted as the majority class: its union is the whole image, the other classes score 0.
    # As in Detectron2, classes that do not occur in the test data are left out of the mean.
    iou = test_count[train_count.argmax()] / test_count.sum()
    return 100.0 * float(iou / np.count_nonzero(test_count))


def _prevalence(train: Sequence[Record], test: Sequence[Record], dataset_name: str) -> float:
    """Average precision of scores that are all alike is the share of positives."""
    labels = [image_labels(record) for record in test]
    counts = np.bincount([label for found in labels for label in found])
    if not counts.any():
        raise ValueError("There is no label in the test data.")
    return 100.0 * float(counts[counts > 0].mean() / len(labels))


def _median_delta1(train: Sequence[Record], test: Sequence[Record], dataset_name: str) -> float:
    def depths(records: Sequence[Record]) -> Iterator[np.ndarray]:  # one at a time: together they may need more memory
        maps = (read_depth(record["depth_file_name"], scale=record["depth_scale"]) for record in records)
        return (depth for depth in maps if depth.any())

    medians = [np.median(depth[depth > 0]) for depth in depths(train)]
    if not medians:
        raise ValueError("There is no known depth in the training data.")
    constant = np.median(medians)
    found = [depth_metrics(constant, depth) for depth in depths(test)]
    if not found:
        raise ValueError("There is no known depth in the test data.")
    return mean_metrics(found)["delta1"]


#: evaluator_type -> metric, and what the constant answer scores from training records, test records and test set name
_CONSTANTS: dict[str, tuple[str, Callable[[Sequence[Record], Sequence[Record], str], float]]] = {
    "classification": ("classification/top1", _majority_accuracy),
    "multi_label": ("multi_label/mAP", _prevalence),
    "sem_seg": ("sem_seg/mIoU", _majority_iou),
    "depth": ("depth/delta1", _median_delta1),
}
