"""LVIS's average precision, by Detectron2's evaluator."""

import contextlib
import io
import logging
import sys
from typing import Any

from detectron2.evaluation import LVISEvaluator

logger = logging.getLogger(__name__)


class QuietLVISEvaluator(LVISEvaluator):
    """Detectron2's LVIS evaluator, counted by hotcoco, without what it prints.

    The package lvis, which Detectron2 imports, was last released in 2020 and does not run with numpy 2; hotcoco has
    the same classes and gives the same numbers. Detections of classes that were not looked for in an image do not
    count, nor do those that match nothing of a class whose objects are not all annotated; 300 an image are taken.
    A model that finds no object gets AP 0 instead of NaN, of masks as well if it predicts them.
    """

    _results: dict[str, dict[str, float]]

    def __init__(self, dataset_name: str, *, output_dir: str | None):
        """See :func:`..build.build_evaluator`."""
        provide_lvis()
        super().__init__(dataset_name, output_dir=output_dir)

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._predicts_masks = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """See :meth:`detectron2.evaluation.LVISEvaluator.process`."""
        super().process(inputs, outputs)
        self._predicts_masks |= any(out["instances"].has("pred_masks") for out in outputs if "instances" in out)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> tuple[str, ...]:
        return ("bbox", "segm") if self._predicts_masks else super()._tasks_from_predictions(predictions)

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        super()._eval_predictions(predictions)
        if not any(found["instances"] for found in predictions):
            self._results = {task: dict.fromkeys(found, 0.0) for task, found in self._results.items()}

    def evaluate(self) -> dict[str, dict[str, float]]:
        """AP, that of rare, common and frequent classes (APr, APc, APf) and others, below ``bbox`` and ``segm``."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            results = super().evaluate() or {}
        logger.debug("LVIS evaluation:\n%s", printed.getvalue().strip())
        return results


def provide_lvis() -> None:
    """Let hotcoco stand in for the package lvis, which Detectron2's evaluator imports.

    Raises:
        ValueError: where hotcoco is not installed.
    """
    try:
        import hotcoco
    except ImportError as error:
        raise ValueError("LVIS data needs the package hotcoco: pip install hotcoco") from error
    if sys.modules.get("lvis") is not hotcoco:
        hotcoco.init_as_lvis()
