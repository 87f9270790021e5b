"""Pascal VOC's average precision, by Detectron2's evaluator, for data in any of the layouts that are read."""

import atexit
import logging
import os
import tempfile
from collections import defaultdict
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class PresentClassesVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's Pascal VOC evaluator, averaged over the classes that occur in the split.

    Detectron2 averages over all: a class without an object then adds 0, or makes the mean NaN once it is predicted.
    Objects marked difficult are not evaluated, so they do not count as an occurrence.
    """

    def __init__(self, dataset_name: str):
        """
        Raises:
            ValueError: if an annotation lacks what the evaluation reads, or a name has what it cannot write.
        """
        super().__init__(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        if "annotation_dir" in metadata.as_dict():  # ours, which need not be in the devkit's folders
            self._anno_file_template = os.path.join(metadata.annotation_dir, "{}.xml")
            self._image_set_path = _write_names(dataset_name)
        self._class_names: list[str] = list(metadata.thing_classes)
        present = self._names_in_split()
        self._present = [index for index, name in enumerate(self._class_names) if name in present]

    def reset(self) -> None:
        """Forget all images."""
        self._predictions: dict[int, list[str]] = defaultdict(list)  # contiguous id -> detections

    def evaluate(self) -> dict[str, dict[str, float]]:
        """AP, AP50 and AP75 below ``bbox``, in percent; empty on all workers but the first or without any object."""
        if not self._present:
            logger.warning("No object of %s is to be found, so AP is undefined.", self._dataset_name)
            return {}
        everything, names = self._predictions, self._class_names
        self._predictions = {new: everything[old] for new, old in enumerate(self._present) if old in everything}
        self._class_names = [names[index] for index in self._present]
        try:
            return super().evaluate() or {}
        finally:
            self._predictions, self._class_names = everything, names

    def _names_in_split(self) -> set[str]:
        with PathManager.open(self._image_set_path) as lines:
            files = [self._anno_file_template.format(line.strip()) for line in lines if line.strip()]
        names = set()
        for file in files:
            try:
                objects = parse_rec(file)
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: Pascal VOC evaluation needs name, pose, truncated, difficult and a bndbox of whole "
                    f"numbers for each object ({error}). Set EVALUATION: coco."
                ) from error
            names |= {item["name"] for item in objects if not item["difficult"]}
        return names


def _write_names(dataset_name: str) -> str:
    """A file of the names of a data set's images, one a line, as Detectron2's Pascal VOC evaluator reads it."""
    names = [str(record["image_id"]) for record in DatasetCatalog.get(dataset_name)]
    classes = MetadataCatalog.get(dataset_name).thing_classes
    wrong = [name for name in names if len(name.split()) != 1] + [name for name in classes if "/" in name]
    if wrong:
        text = "Pascal VOC evaluation takes no image whose name has a space, and no class with a slash"
        raise ValueError(f"data set {dataset_name!r} has {wrong[0]!r}: {text}. Set EVALUATION: coco.")
    path = temporary_folder() / "names.txt"
    path.write_text("\n".join(names), encoding="utf-8")
    return str(path)


def temporary_folder() -> Path:
    """A folder that is there until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="xlearner_d2_")
    atexit.register(folder.cleanup)
    return Path(folder.name)
