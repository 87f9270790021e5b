"""Panoptic quality, by Detectron2's evaluator over hotcoco's implementation of COCO's protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOPanopticEvaluator

from ..extensions import provide_panopticapi


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's, but images may have one name in different folders, and no worker's results are None."""

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        """See :func:`.build.build_evaluator`."""
        provide_panopticapi()
        super().__init__(dataset_name, output_dir)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`COCOPanopticEvaluator.process`."""
        for image, found in zip(inputs, outputs, strict=True):
            super().process([image], [found])
            # All predictions are written to one folder.
            self._predictions[-1]["file_name"] = f"{image['image_id']}.png"

    def evaluate(self) -> dict[str, Any]:
        """PQ, SQ and RQ, also of things and of stuff alone, in percent; empty on all workers but the first."""
        return super().evaluate() or {}
