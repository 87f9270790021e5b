"""The evaluator of a data set, chosen by its metadata, and the headline numbers of an evaluation."""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import (
    DatasetEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params
from torch import Tensor

from ..data.rotated import has_rotated_boxes
from .classification import ClassificationEvaluator
from .depth import DepthEvaluator
from .fast_coco import FastCOCOEvaluator
from .lvis import QuietLVISEvaluator
from .multi_label import MultiLabelEvaluator
from .panoptic import PanopticEvaluator
from .voc import PresentClassesVOCEvaluator, temporary_folder

logger = logging.getLogger(__name__)

#: What evaluators call their numbers, by kind of result; the first stands for its kind. One of a single class, such as
#: ``AP-dog``, has a hyphen and is not here.
METRICS: dict[str, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
    "sem_seg": ("mIoU", "fwIoU", "mACC", "pACC"),
    "panoptic_seg": ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"),
    "box_proposals": ("AR@1000",),
    "classification": ("top1", "top5", "mean_class_acc"),
    "multi_label": ("mAP",),
    "depth": ("delta1", "abs_rel", "rmse"),
}


def main_metric(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One number per kind of prediction, named as Detectron2 names it in metrics.json.

    Args:
        results: what one evaluator returned; may be empty.

    Returns:
        for example ``{"bbox/AP": 41.2, "segm/AP": 37.0}``, in percent; NaN where a metric is undefined.
    """
    return {
        f"{kind}/{headline}": float(results[kind][headline])
        for kind, (headline, *_) in METRICS.items()
        if headline in results.get(kind, {})
    }


@contextlib.contextmanager
def _stdout_to_log() -> Iterator[None]:
    """Send what pycocotools or hotcoco prints to the log, at debug level."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue().strip():
            logger.debug("COCO evaluation:\n%s", printed.getvalue().strip())


class QuietCOCOEvaluator(FastCOCOEvaluator):
    """Detectron2's COCO evaluator, except that it is faster, and in four points.

    Nothing is printed; a model that finds no object gets AP 0 instead of NaN (NaN stays where there is no object to be
    found); masks and keypoints are scored whenever the model predicts them, even if it found nothing, but masks not
    when objects of the data set lack them; annotations may lack ``iscrowd``, ``area`` and ``num_keypoints``.
    """

    def __init__(self, dataset_name: str, *, output_dir: str | None, keypoint_sigmas: Sequence[float] = ()):
        """See :func:`build_evaluator`.

        Args:
            keypoint_sigmas: of each keypoint, see COCO's object keypoint similarity; needed unless they are COCO's 17.
        """
        super().__init__(
            dataset_name,
            output_dir=output_dir,
            kpt_oks_sigmas=keypoint_sigmas,
            use_fast_impl=COCOeval_opt is not COCOeval,
            # A file of an earlier run may describe other data.
            allow_cached_coco=False,
        )
        annotations = _complete(self._coco_api)
        for annotation in annotations:
            if "keypoints" in annotation:
                annotation.setdefault("num_keypoints", sum(visible > 0 for visible in annotation["keypoints"][2::3]))
        self._num_without_mask = sum(not annotation.get("segmentation") for annotation in annotations)

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._predicts_masks = self._predicts_keypoints = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """See :meth:`detectron2.evaluation.COCOEvaluator.process`."""
        super().process(inputs, outputs)
        found = [out["instances"] for out in outputs if "instances" in out]
        self._predicts_masks |= any(instances.has("pred_masks") for instances in found)
        self._predicts_keypoints |= any(instances.has("pred_keypoints") for instances in found)

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]]:
        """See :meth:`detectron2.evaluation.COCOEvaluator.evaluate`."""
        with _stdout_to_log():
            return super().evaluate(img_ids)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        tasks = set(super()._tasks_from_predictions(predictions))
        if self._predicts_masks:
            tasks.add("segm")
        if self._predicts_keypoints:
            tasks.add("keypoints")
        if "segm" in tasks and self._num_without_mask:
            logger.warning("Masks are not scored: %d annotations have none.", self._num_without_mask)
            tasks.remove("segm")
        return sorted(tasks)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._evaluate_nothing(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> Any:
        """COCOeval of no detection at all, which ``loadRes`` of pycocotools cannot express."""
        empty = COCO()
        empty.dataset = {**self._coco_api.dataset, "annotations": []}
        empty.createIndex()
        coco_eval = COCOeval(self._coco_api, empty, iou_type)
        if iou_type == "keypoints" and self._kpt_oks_sigmas:
            coco_eval.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval


def _complete(truth: COCO) -> list[dict[str, Any]]:
    """The annotations, which may lack ``iscrowd`` and ``area``, with both."""
    annotations: list[dict[str, Any]] = truth.dataset.get("annotations", [])
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return annotations


class QuietRotatedCOCOEvaluator(RotatedCOCOEvaluator):
    """Detectron2's evaluator of rotated boxes, except that nothing is printed, a model that finds no object gets AP 0
    instead of NaN, annotations may lack ``iscrowd`` and ``area``, and crowds, which it cannot handle, are left out."""

    def __init__(self, dataset_name: str, *, output_dir: str | None):
        """See :func:`build_evaluator`."""
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False, allow_cached_coco=False)
        annotations = _complete(self._coco_api)
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        if len(objects) < len(annotations):
            crowds = f"{len(annotations) - len(objects)} crowds of {dataset_name}"
            logger.warning("%s are left out, so what is found there counts as wrong: boxes are rotated.", crowds)
            self._coco_api.dataset["annotations"] = objects
            with _stdout_to_log():
                self._coco_api.createIndex()

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]]:
        """See :meth:`detectron2.evaluation.COCOEvaluator.evaluate`."""
        with _stdout_to_log():
            return super().evaluate(img_ids)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        found = super()._derive_coco_results(coco_eval, iou_type, class_names)
        nothing = coco_eval is None and self._coco_api.dataset.get("annotations")
        return dict.fromkeys(found, 0.0) if nothing else found


def _write_coco_json(dataset_name: str) -> str:
    """A COCO json of a data set that was read from another format."""
    path = str(temporary_folder() / f"{dataset_name}.json")
    convert_to_coco_json(dataset_name, path, allow_cached=False)
    return path


class _Scores:
    """Scores of an image, (classes, height, width), of which Detectron2's evaluator asks for the best class alone.

    On a CPU, ``argmax`` over the first dimension takes several times as long as ``max``, whose first index is the same.
    """

    def __init__(self, scores: Tensor):
        self._scores = scores

    def argmax(self, dim: int) -> Tensor:
        return self._scores.max(dim=dim).indices


class CheckedSemSegEvaluator(SemSegEvaluator):
    """Detectron2's semantic segmentation evaluator for any numpy version, with a clear error for impossible labels."""

    def __init__(self, dataset_name: str, *, output_dir: str | None):
        """See :func:`build_evaluator`."""
        meta = MetadataCatalog.get(dataset_name)
        read = functools.partial(read_labels, num_classes=len(meta.stuff_classes), ignore_label=meta.ignore_label)
        super().__init__(dataset_name, output_dir=output_dir, sem_seg_loading_fn=read)

    def process(self, inputs: Any, outputs: Any) -> None:
        """See :meth:`SemSegEvaluator.process`."""
        super().process(inputs, [{**output, "sem_seg": _Scores(output["sem_seg"])} for output in outputs])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """See :meth:`SemSegEvaluator.evaluate`; empty on all workers but the first."""
        # Without a single labelled pixel the means are 0 / 0, which is NaN as it should be.
        with np.errstate(invalid="ignore", divide="ignore"):
            return super().evaluate() or {}


def read_labels(file_name: str, dtype: Any = int, *, num_classes: int, ignore_label: int) -> np.ndarray:
    """Read a map of class indices.

    Returns:
        array [height, width] of ``dtype``, writable.

    Raises:
        ValueError: for a colour image, or a label that is neither a class nor ``ignore_label``.
    """
    with PathManager.open(file_name, "rb") as file:
        labels = np.array(Image.open(file), dtype=dtype)
    if labels.ndim != 2:
        raise ValueError(f"{file_name} has shape {labels.shape}, but a PNG of one channel is expected.")
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_label)]
    if wrong.size:
        raise ValueError(
            f"{file_name} has the label {wrong[0]}; expected: 0 to {num_classes - 1}, or {ignore_label} to ignore."
        )
    return labels


def _build_coco(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    if "json_file" not in meta.as_dict():
        meta.json_file = _write_coco_json(name)
    if head is not None and has_rotated_boxes(head):
        return QuietRotatedCOCOEvaluator(name, output_dir=output_dir)
    return QuietCOCOEvaluator(name, output_dir=output_dir, keypoint_sigmas=_keypoint_sigmas(meta, head))


def _keypoint_sigmas(meta: Metadata, head: CfgNode | None) -> list[float]:
    """``TEST.KEYPOINT_OKS_SIGMAS``, or for other keypoints than COCO's 17 the mean of COCO's; empty for COCO's."""
    given = list(head.TEST.KEYPOINT_OKS_SIGMAS) if head is not None else []
    names = meta.get("keypoint_names", ())
    coco = Params(iouType="keypoints").kpt_oks_sigmas
    return given or ([] if len(names) in (0, len(coco)) else [float(coco.mean())] * len(names))


def _build_lvis(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return QuietLVISEvaluator(name, output_dir=output_dir)


def _build_voc(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return PresentClassesVOCEvaluator(name)


def _build_sem_seg(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return CheckedSemSegEvaluator(name, output_dir=output_dir)


def _build_classification(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return ClassificationEvaluator(class_names=meta.classes)


def _build_multi_label(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return MultiLabelEvaluator(class_names=meta.get("classes", None) or meta.thing_classes)


def _build_panoptic(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return PanopticEvaluator(name, output_dir)


def _build_depth(name: str, meta: Metadata, output_dir: str | None, head: CfgNode | None) -> DatasetEvaluator:
    return DepthEvaluator()


_Builder = Callable[[str, Metadata, str | None, CfgNode | None], DatasetEvaluator]
#: evaluator_type -> who builds its evaluator
_BUILDERS: dict[str, _Builder] = {
    "coco": _build_coco,
    "lvis": _build_lvis,
    "pascal_voc": _build_voc,
    "sem_seg": _build_sem_seg,
    "classification": _build_classification,
    "multi_label": _build_multi_label,
    "coco_panoptic_seg": _build_panoptic,
    "depth": _build_depth,
}


def evaluator_type(dataset_name: str, head: CfgNode | None = None) -> str | None:
    """What is evaluated: what the data set's metadata says, unless its head learns something else from it."""
    if head is not None and head.MODEL.META_ARCHITECTURE == "ImageClassifier" and head.MODEL.CLASSIFIER.MULTI_LABEL:
        return "multi_label"
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    # Detectron2 has Cityscapes' own scripts for it, which need its folders; its mIoU is that of all other data.
    return "sem_seg" if kind == "cityscapes_sem_seg" else kind


def _known_type(dataset_name: str, head: CfgNode | None) -> str:
    kind = evaluator_type(dataset_name, head)
    if kind not in _BUILDERS:
        raise ValueError(
            f"evaluator_type of the data set {dataset_name!r} is {kind!r}, but {', '.join(_BUILDERS)} are known."
        )
    return kind


def check_evaluation(dataset_name: str, head: CfgNode | None = None) -> None:
    """See that a data set has an evaluator and, where its registration need not do so, that it can be read by it.

    Raises:
        ValueError: as :func:`build_evaluator`.
    """
    kind = _known_type(dataset_name, head)
    if kind == "pascal_voc":
        PresentClassesVOCEvaluator(dataset_name)
    if kind == "coco_panoptic_seg" and any(isinstance(of["image_id"], str) for of in DatasetCatalog.get(dataset_name)):
        wish = "but its evaluation needs whole numbers"
        raise ValueError(f"the image ids of the data set {dataset_name!r} are text, {wish}; training does not.")


def build_evaluator(dataset_name: str, *, output_dir: str | None, head: CfgNode | None = None) -> DatasetEvaluator:
    """Build the evaluator that ``evaluator_type`` of a data set's metadata asks for.

    Args:
        dataset_name: a registered data set.
        output_dir: predictions are written to the folder ``dataset_name`` below it; None writes nothing.
        head: config of the head that is evaluated, where it makes a difference: to multi-label classifiers, and to
            keypoints, of which it has the ``TEST.KEYPOINT_OKS_SIGMAS``.

    Raises:
        ValueError: for an unregistered data set, an unknown ``evaluator_type``, or annotations that cannot be used.
    """
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(f"There is no data set {dataset_name!r}; it has to be registered before it is evaluated.")
    kind = _known_type(dataset_name, head)
    folder = None
    if output_dir is not None:
        # The evaluators use fixed file names, so data sets need a folder each.
        folder = os.path.join(output_dir, dataset_name)
        PathManager.mkdirs(folder)
    return _BUILDERS[kind](dataset_name, MetadataCatalog.get(dataset_name), folder, head)
