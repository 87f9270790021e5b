"""Panoptic labels: one PNG of segment ids and a category for each segment, mapped to what panoptic heads learn from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from ..extensions import rgb2id
from ..labels import PanopticLabels
from .stock_mapper import build_stock_mapper, with_color_jitter

Record = dict[str, Any]

#: What of a record the mapper reads or makes anew.
_REPLACED = ("pan_seg_file_name", "segments_info", "sem_seg_file_name")


class PanopticMapper:
    """Instances of things, and semantic labels of stuff with one class for all things, as PanopticFPN wants them.

    Args:
        augmentations: applied to image and segments alike.
        image_format: channel order of the image.
        labels: how the model numbers the data set's categories.
        ignore_label: of pixels without a segment.
    """

    def __init__(
        self, *, augmentations: Sequence[Any], image_format: str, labels: PanopticLabels, ignore_label: int = 255
    ):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.labels = labels
        self.ignore_label = ignore_label

    def __call__(self, record: Record) -> Record:
        """Add ``image`` (3, H, W) uint8, ``sem_seg`` (H, W) int64 and ``instances`` with bit masks."""
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        colours = utils.read_image(record["pan_seg_file_name"], "RGB")
        given = T.AugInput(image, sem_seg=colours)  # as colours, which resize like labels
        self.augmentations(given)
        segments = rgb2id(given.sem_seg)  # (H, W)
        labels = {key: value for key, value in record.items() if key not in _REPLACED}
        return {
            **labels,
            "height": record.get("height", image.shape[0]),
            "width": record.get("width", image.shape[1]),
            "image": torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1))),
            "sem_seg": torch.as_tensor(self._semantic(segments, record["segments_info"])),
            "instances": self._instances(segments, record["segments_info"]),
        }

    def _semantic(self, segments: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> np.ndarray:
        labels = np.full(segments.shape, self.ignore_label, dtype=np.int64)
        for info in infos:
            is_thing = self._is_thing(info)
            number = 0 if is_thing else self.labels.in_model(info["category_id"], is_thing=False)
            labels[segments == info["id"]] = number
        return labels

    def _is_thing(self, info: Mapping[str, Any]) -> bool:
        """Also where records do not say, as those of Detectron2's Cityscapes."""
        return bool(info.get("isthing", info["category_id"] in self.labels.things))

    def _instances(self, segments: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> Instances:
        things = [info for info in infos if self._is_thing(info) and not info.get("iscrowd", 0)]
        masks = np.stack([segments == info["id"] for info in things]) if things else np.zeros((0, *segments.shape))
        found = Instances(segments.shape)
        found.gt_masks = BitMasks(torch.as_tensor(masks, dtype=torch.bool))
        found.gt_boxes = found.gt_masks.get_bounding_boxes()
        classes = [self.labels.in_model(info["category_id"], is_thing=True) for info in things]
        found.gt_classes = torch.tensor(classes, dtype=torch.int64)
        return utils.filter_empty_instances(found)


def build_panoptic_mapper(head: CfgNode, *, is_train: bool) -> Callable[[Record], Record]:
    """For PanopticFPN: of records with a panoptic PNG, or of Detectron2's "separated" ones, with its own mapper."""
    stock = build_stock_mapper(head, is_train=is_train)
    metadata = MetadataCatalog.get(head.DATASETS.TRAIN[0])
    labels = PanopticLabels.of(metadata)
    if not is_train or labels is None:
        return stock
    mapper = PanopticMapper(
        augmentations=stock.augmentations.augs,
        image_format=head.INPUT.FORMAT,
        labels=labels,
        ignore_label=metadata.get("ignore_label", 255),
    )
    return _ByRecord(separated=stock, panoptic=mapper)


class _ByRecord:
    """The mapper that suits a record; a class, so that worker processes can be given one."""

    def __init__(self, *, separated: Callable[[Record], Record], panoptic: Callable[[Record], Record]):
        self.separated = separated
        self.panoptic = panoptic

    def __call__(self, record: Record) -> Record:
        # Cityscapes has semantic labels beside the panoptic ones, but no objects and other numbers.
        separated = "sem_seg_file_name" in record and "annotations" in record
        return (self.separated if separated else self.panoptic)(record)


def build_panoptic_deeplab_mapper(head: CfgNode, *, is_train: bool) -> Callable[[Record], Record]:
    """Panoptic-DeepLab's own."""
    if not is_train:
        return build_stock_mapper(head, is_train=False)
    from detectron2.projects.panoptic_deeplab import PanopticDeeplabDatasetMapper

    return with_color_jitter(PanopticDeeplabDatasetMapper(head), head)
