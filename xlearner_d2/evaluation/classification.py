"""Accuracy of image classifiers, in the form of a Detectron2 evaluator."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.utils.logger import create_small_table

from .per_image import PerImageEvaluator

logger = logging.getLogger(__name__)


class _Outcome(NamedTuple):
    label: int
    top1: bool
    top5: bool
    is_nan: bool


class ClassificationEvaluator(PerImageEvaluator[_Outcome]):
    """Top-1, top-5 and mean class accuracy, in percent.

    With fewer than five classes, ``top5`` is the accuracy within all of them. Equal scores are ranked by class index;
    an image with a NaN score counts as wrong.
    """

    def __init__(self, *, class_names: Sequence[str], distributed: bool = True):
        """
        Args:
            class_names: names of the classes, in order of their index.
            distributed: gather from all workers; every worker must then call :meth:`evaluate`.
        """
        self._num_classes = len(class_names)
        super().__init__(distributed=distributed)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Compare a batch of predictions with the labels.

        Args:
            inputs: one mapping per image, with ``category_id`` (0-based int).
            outputs: one mapping per image, with ``scores``: [num_classes], on any device. Only their order matters.

        Raises:
            ValueError: if an image has no usable label, or another number of scores than there are classes.
        """
        if not inputs:
            return
        labels = torch.tensor([self._label(item) for item in inputs])
        scores = torch.stack([output["scores"] for output in outputs]).float()  # [images, classes]
        if scores.shape != (len(labels), self._num_classes):
            raise ValueError(
                f"Got scores of shape {tuple(scores.shape)} for {len(labels)} images and {self._num_classes} classes; "
                f"({len(labels)}, {self._num_classes}) is expected. Check MODEL.CLASSIFIER.NUM_CLASSES."
            )
        has_nan = scores.isnan().any(dim=1).cpu()
        # A stable sort, since topk leaves the order of equal scores open.
        ranking = scores.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()  # [images, min(5, classes)]
        hits = (ranking == labels[:, None]) & ~has_nan[:, None]
        for item, label, hit, is_nan in zip(inputs, labels.tolist(), hits, has_nan.tolist(), strict=True):
            self.keep(item, _Outcome(label, bool(hit[0]), bool(hit.any()), is_nan))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Metrics over all workers' images, in percent; empty on all workers but the first, or without any image.

        Returns:
            ``{"classification": {"top1": …, "top5": …, "mean_class_acc": …}}``, the last over the classes that occur.
        """
        outcomes = self.gather()
        if outcomes is None:
            return OrderedDict()
        num_nan = sum(outcome.is_nan for outcome in outcomes)
        if num_nan:
            logger.warning("%d of %d images got NaN scores and count as wrong.", num_nan, len(outcomes))
        if not outcomes:
            logger.warning("There are no predictions to evaluate.")
            return OrderedDict()
        metrics = _accuracies(outcomes)
        logger.info("Classification of %d images:\n%s", len(outcomes), create_small_table(metrics))
        return OrderedDict(classification=metrics)

    def _label(self, item: Mapping[str, Any]) -> int:
        label = item.get("category_id")
        if label is None:
            known = ", ".join(sorted(item))
            raise ValueError(f"An image lacks category_id, which its mapper has to keep (it has {known}).")
        if not 0 <= label < self._num_classes:
            raise ValueError(f"category_id is {label}, but 0 to {self._num_classes - 1} is expected.")
        return int(label)


def _accuracies(outcomes: Sequence[_Outcome]) -> dict[str, float]:
    label, top1, top5, _ = (np.asarray(column) for column in zip(*outcomes, strict=True))
    count = np.bincount(label)
    correct = np.bincount(label, weights=top1)
    return {
        "top1": 100 * float(top1.mean()),
        "top5": 100 * float(top5.mean()),
        "mean_class_acc": 100 * float((correct[count > 0] / count[count > 0]).mean()),
    }
