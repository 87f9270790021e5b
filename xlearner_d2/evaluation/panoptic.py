"""Panoptic quality, by Detectron2's evaluator over hotcoco's implementation of COCO's protocol."""

from typing import Any

from detectron2.evaluation import COCOPanopticEvaluator

from ..extensions import provide_panopticapi


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's, whose results are empty instead of None on all workers but the first."""

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        """See :func:`.build.build_evaluator`."""
        provide_panopticapi()
        super().__init__(dataset_name, output_dir)

    def evaluate(self) -> dict[str, Any]:
        """See :meth:`COCOPanopticEvaluator.evaluate`: PQ, SQ and RQ, also of things and of stuff alone, in percent."""
        return super().evaluate() or {}
