"""COCO's average precision, counted by a library that is many times faster than pycocotools, to the same bit."""

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

try:
    import hotcoco
except ImportError:  # no wheel for this machine
    hotcoco = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: What the counting reads; hotcoco is strict about the types of other fields, which files in the wild get wrong.
_IMAGE_KEYS = ("id", "height", "width")
_ANNOTATION_KEYS = (
    "id",
    "image_id",
    "category_id",
    "bbox",
    "area",
    "iscrowd",
    "segmentation",
    "keypoints",
    "num_keypoints",
)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator with hotcoco in place of pycocotools, for boxes, masks and keypoints.

    Annotations that hotcoco refuses to read, and machines without it, get pycocotools and a line in the log.
    """

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        truth = self._read_truth() if self._do_evaluation else None
        if truth is None:
            super()._eval_predictions(predictions, img_ids)
            return
        results = list(itertools.chain.from_iterable(found["instances"] for found in predictions))
        self._restore_category_ids(results)
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
                file.write(json.dumps(results))
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            counted = self._count(truth, results, task, img_ids) if results else None
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(counted, task, class_names=names)

    def _read_truth(self) -> Any:
        """The annotations as hotcoco takes them, or None if it does not."""
        if hotcoco is None:
            logger.warning("hotcoco is not installed: pycocotools evaluates, to the same numbers but more slowly.")
            return None
        try:
            return hotcoco.COCO(_essential(self._coco_api.dataset))
        except (ValueError, TypeError) as error:
            logger.warning(f"pycocotools evaluates {self._metadata.name}, as hotcoco cannot read it: {error}")
            return None

    def _restore_category_ids(self, results: list[dict[str, Any]]) -> None:
        """Contiguous class indices become the data set's own ids."""
        if not hasattr(self._metadata, "thing_dataset_id_to_contiguous_id"):
            return
        ids = {index: own for own, index in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        wrong = {result["category_id"] for result in results} - set(ids)
        if wrong:
            message = f"{self._metadata.name} has {len(ids)} classes, but class {min(wrong)} was predicted."
            raise ValueError(f"{message} The head has another number of classes than the data set.")
        for result in results:
            result["category_id"] = ids[result["category_id"]]

    def _count(self, truth: Any, results: Sequence[dict[str, Any]], task: str, img_ids: list[int] | None) -> Any:
        """An evaluation with the attributes of pycocotools' COCOeval that Detectron2 reads."""
        if task == "segm":
            # With a box, a mask would count as small, medium or large by the box's area instead of its own.
            results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
        evaluation = hotcoco.COCOeval(truth, truth.load_res(results), task)
        if task == "keypoints":
            if self._kpt_oks_sigmas:
                evaluation.params.kpt_oks_sigmas = [float(sigma) for sigma in self._kpt_oks_sigmas]
            _check_keypoints(results, truth, len(evaluation.params.kpt_oks_sigmas))
        else:
            evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def _essential(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are read, without those that are null."""
    return {
        "images": [{key: image[key] for key in _IMAGE_KEYS if key in image} for image in dataset["images"]],
        "categories": [{"id": found["id"], "name": str(found["name"])} for found in dataset["categories"]],
        "annotations": [
            {key: found[key] for key in _ANNOTATION_KEYS if found.get(key) is not None}
            for found in dataset["annotations"]
        ],
    }


def _check_keypoints(results: Sequence[dict[str, Any]], truth: Any, num_sigmas: int) -> None:
    predicted = len(results[0]["keypoints"]) // 3
    labelled = next((len(found["keypoints"]) // 3 for found in truth.anns.values() if "keypoints" in found), 0)
    if not predicted == labelled == num_sigmas:
        raise ValueError(
            f"{predicted} keypoints are predicted and {labelled} labelled, but TEST.KEYPOINT_OKS_SIGMAS has "
            f"{num_sigmas}; all three have to agree."
        )
