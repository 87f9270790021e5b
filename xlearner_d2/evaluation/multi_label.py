"""Mean average precision of classifiers whose images have any number of labels, as a Detectron2 evaluator."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from .per_image import PerImageEvaluator

logger = logging.getLogger(__name__)


class MultiLabelEvaluator(PerImageEvaluator[tuple[np.ndarray, np.ndarray]]):
    """The mean over classes of scikit-learn's average precision, in percent, over the classes that occur."""

    def __init__(self, *, class_names: Sequence[str], distributed: bool = True):
        """
        Args:
            class_names: names of the classes, in order of their index.
            distributed: gather from all workers; every worker must then call :meth:`evaluate`.
        """
        self._num_classes = len(class_names)
        super().__init__(distributed=distributed)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Keep a batch of predictions and labels.

        Args:
            inputs: one mapping per image, with ``category_ids`` (0-based ints).
            outputs: one mapping per image, with ``label_scores``: [num_classes], on any device. Only their order
                matters.

        Raises:
            ValueError: if an image has no usable labels, or another number of scores than there are classes.
        """
        for item, output in zip(inputs, outputs, strict=True):
            scores = output["label_scores"].float().cpu().numpy()
            if scores.shape != (self._num_classes,):
                got = f"Got label_scores of shape {scores.shape} for {self._num_classes} classes"
                raise ValueError(f"{got}. Check MODEL.CLASSIFIER.NUM_CLASSES.")
            self.keep(item, (self._labels(item), np.nan_to_num(scores, nan=float(np.finfo(np.float32).min))))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """``{"multi_label": {"mAP": …}}`` over all workers' images; empty on all workers but the first.

        NaN where no image has a label.
        """
        images = self.gather()
        if images is None:
            return OrderedDict()
        if not images:
            logger.warning("There are no predictions to evaluate.")
            return OrderedDict()
        labels, scores = (np.stack(column) for column in zip(*images, strict=True))  # [images, classes]
        value = mean_average_precision(labels, scores)
        logger.info("Multi-label classification of %d images: mAP %.2f.", len(images), value)
        return OrderedDict(multi_label={"mAP": value})

    def _labels(self, item: Mapping[str, Any]) -> np.ndarray:
        """One or zero for each class."""
        if "category_ids" not in item:
            known = ", ".join(sorted(item))
            raise ValueError(f"An image lacks category_ids, which its mapper has to keep (it has {known}).")
        labels = np.zeros(self._num_classes, dtype=int)
        for label in item["category_ids"]:
            if not 0 <= label < self._num_classes:
                raise ValueError(f"category_ids has {label}, but 0 to {self._num_classes - 1} is expected.")
            labels[label] = 1
        return labels


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """In percent, over the classes that occur; NaN if none does.

    Args:
        labels: [images, classes] of zeros and ones.
        scores: [images, classes], finite.
    """
    present = np.flatnonzero(labels.any(axis=0))
    if not len(present):
        return float("nan")
    return 100.0 * float(np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in present]))
