"""How far a predicted depth is from the true one, as a Detectron2 evaluator."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.logger import create_small_table

from ..data.depth import read_depth
from .per_image import PerImageEvaluator

logger = logging.getLogger(__name__)


class DepthEvaluator(PerImageEvaluator[dict[str, float]]):
    """Mean over images of :func:`depth_metrics`, at the size of the depth map; images of unknown depth are left out."""

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Compare a batch of predictions with the files of the true depth.

        Args:
            inputs: one mapping per image, with ``depth_file_name`` and ``depth_scale``.
            outputs: one mapping per image, with ``depth``: [height, width] in metres, as large as the true one.

        Raises:
            ValueError: for a prediction of another size.
        """
        for item, output in zip(inputs, outputs, strict=True):
            truth = read_depth(item["depth_file_name"], scale=item["depth_scale"])
            predicted = output["depth"].float().cpu().numpy()
            if predicted.shape != truth.shape:
                got = f"{predicted.shape} for {item['depth_file_name']}"
                raise ValueError(f"Got a depth of shape {got}, but {truth.shape} is expected.")
            if truth.any():
                self.keep(item, depth_metrics(predicted, truth))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """``{"depth": …}`` with the keys of :func:`depth_metrics`; empty on all workers but the first."""
        images = self.gather()
        if images is None:
            return OrderedDict()
        if not images:
            logger.warning("There is no image with a known depth to evaluate.")
            return OrderedDict()
        metrics = mean_metrics(images)
        logger.info("Depth of %d images:\n%s", len(images), create_small_table(metrics))
        return OrderedDict(depth=metrics)


def mean_metrics(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over images."""
    return {key: float(np.mean([metrics[key] for metrics in found])) for key in found[0]}


def depth_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The usual measures (Eigen et al., 2014) over the pixels of known depth.

    Args:
        predicted: positive numbers, which broadcast to the shape of ``truth``.
        truth: [height, width], 0 where unknown, of which something must be known.

    Returns:
        ``delta1``: percent of pixels off by a factor of less than 1.25; ``abs_rel``: mean of |error| / truth;
        ``rmse``: root of the mean squared error, in the unit of the depths.
    """
    known = truth > 0
    wanted, found = truth[known].astype(float), np.broadcast_to(predicted, truth.shape)[known].astype(float)
    ratio = np.maximum(wanted / found, found / wanted)
    return {
        "delta1": 100.0 * float((ratio < 1.25).mean()),
        "abs_rel": float((np.abs(found - wanted) / wanted).mean()),
        "rmse": float(np.sqrt(((found - wanted) ** 2).mean())),
    }
