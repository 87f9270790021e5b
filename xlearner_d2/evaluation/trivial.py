"""What a predictor without learning scores: the floor that every result is read against."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .build import read_labels

Record = Mapping[str, Any]


def trivial_metrics(dataset_name: str, *, train_names: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of the best constant answer that needs no image, under the keys of :func:`.build.main_metric`.

    Classification answers the most frequent class of the training images; semantic segmentation the most frequent class
    of the training pixels, everywhere; detection and instance segmentation find nothing.

    Args:
        dataset_name: the registered data set that is evaluated.
        train_names: the data sets with the same label space that the constant is taken from; not used for detection.

    Returns:
        percentages, for example ``{"classification/top1": 11.3}``.

    Raises:
        ValueError: for an unknown ``evaluator_type``, a missing training set, or data without any label.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in ("coco", "lvis", "pascal_voc", "sem_seg", "classification"):
        raise ValueError(f"evaluator_type of the data set {dataset_name!r} is {kind!r}; no constant answer is known.")
    test = DatasetCatalog.get(dataset_name)
    if kind == "pascal_voc":
        return {"bbox/AP": 0.0}
    if kind in ("coco", "lvis"):
        has_masks = any(item.get("segmentation") for record in test for item in record.get("annotations", ()))
        return {"bbox/AP": 0.0, "segm/AP": 0.0} if has_masks else {"bbox/AP": 0.0}
    if not train_names:
        raise ValueError(
            f"The constant answer for {dataset_name!r} comes from training data, but train_names is empty."
        )
    train = [record for name in train_names for record in DatasetCatalog.get(name)]
    if kind == "classification":
        return {"classification/top1": _majority_accuracy(train, test)}
    return {"sem_seg/mIoU": _majority_iou(train, test, dataset_name)}


def _count(labels: Iterable[np.ndarray], num_classes: int, where: str) -> np.ndarray:
    """How often each class occurs: [num_classes]; other labels are left out."""
    total = np.zeros(num_classes, dtype=np.int64)
    for part in labels:
        total += np.bincount(part[(part >= 0) & (part < num_classes)].ravel(), minlength=num_classes)
    if not total.any():
        raise ValueError(f"There is no label in the {where} data.")
    return total


def _majority_accuracy(train: Sequence[Record], test: Sequence[Record]) -> float:
    labels = [np.array([record["category_id"] for record in records], dtype=int) for records in (train, test)]
    num_classes = 1 + max(int(part.max(initial=0)) for part in labels)
    train_count = _count(labels[:1], num_classes, "training")
    test_count = _count(labels[1:], num_classes, "test")
    return 100.0 * float(test_count[train_count.argmax()] / test_count.sum())


def _majority_iou(train: Sequence[Record], test: Sequence[Record], dataset_name: str) -> float:
    meta = MetadataCatalog.get(dataset_name)
    num_classes, ignore_label = len(meta.stuff_classes), meta.ignore_label

    def label_maps(records: Sequence[Record]) -> Iterator[np.ndarray]:
        for record in records:
            labels = read_labels(record["sem_seg_file_name"], num_classes=num_classes, ignore_label=ignore_label)
            yield labels[labels != ignore_label]

    train_count = _count(label_maps(train), num_classes, "training")
    test_count = _count(label_maps(test), num_classes, "test")
    # Every pixel is predicted as the majority class: its union is the whole image, the other classes score 0.
    # As in Detectron2, classes that do not occur in the test data are left out of the mean.
    iou = test_count[train_count.argmax()] / test_count.sum()
    return 100.0 * float(iou / np.count_nonzero(test_count))
