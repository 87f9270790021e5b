"""Models and images to measure: ResNets with light heads, on random images with labels for any head."""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from xlearner_d2 import XLearner, add_xlearner_config
from xlearner_d2.modeling import small_maps

HEADS = {
    "classifier": "configs/heads/classifier.yaml",
    "semantic FPN": "configs/heads/light_semantic_fpn.yaml",
    "RetinaNet": "configs/heads/light_retinanet_fpn.yaml",
    "Faster R-CNN": "configs/heads/light_faster_rcnn_fpn.yaml",
}
#: One source each of three tasks.
THREE_TASKS = ("classifier", "RetinaNet", "semantic FPN")
CLASSES = ["a", "b", "c", "d"]
Batch = dict[str, list[dict[str, Any]]]


def make_config(heads: tuple[str, ...], *opts: Any, depth: int = 18) -> CfgNode:
    """A config with one source for each head, ``source0`` and so on, each a task unless ``opts`` say otherwise."""
    names = {"classes": CLASSES, "thing_classes": CLASSES, "stuff_classes": CLASSES, "ignore_label": 255}
    MetadataCatalog.get("benchmark").set(**names)
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "XLearner"
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = depth, 64 if depth < 50 else 256
    for number, head in enumerate(heads):
        record = {"TASK": f"task{number}", "CONFIG": HEADS[head], "TRAIN": ["benchmark"]}
        cfg.XLEARNER.SOURCES[f"source{number}"] = CfgNode(record)
    cfg.merge_from_list(list(opts))
    return cfg


def compute_as_on_a_gpu() -> None:
    """Leave out what is for CPUs alone, the products for small maps, and take bf16 whether the CPU has it or not."""
    small_maps._kind = lambda *_: None  # type: ignore[assignment]
    torch.cpu._is_avx512_bf16_supported = lambda: True


def make_model(heads: tuple[str, ...], *opts: Any, depth: int = 18) -> XLearner:
    """See :func:`make_config`."""
    torch.manual_seed(0)
    model = build_model(make_config(heads, *opts, depth=depth))
    return model.to(memory_format=torch.channels_last)


def make_images(*, count: int, size: int) -> list[dict[str, Any]]:
    """Random square images with labels for any head."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(count):
        corners = torch.randint(0, size // 2, (4, 2), generator=generator).float()
        boxes = Boxes(torch.cat([corners, corners + size // 3], dim=1))
        record: dict[str, Any] = {"image": torch.randint(0, 256, (3, size, size), generator=generator).byte()}
        if torch.cuda.is_available():
            record["image"] = record["image"].pin_memory()  # as the training loader does
        record |= {"height": size, "width": size, "category_id": 1}
        record["instances"] = Instances((size, size), gt_boxes=boxes, gt_classes=torch.arange(4))
        record["sem_seg"] = torch.randint(0, len(CLASSES), (size, size), generator=generator)
        records.append(record)
    return records


def make_batch(model: XLearner, *, count: int, size: int) -> Batch:
    """So many images for every source."""
    return {
        source: [
            # A model that finds labels for several kinds of head would learn from all of them.
            {key: value for key, value in record.items() if key != "sem_seg" or "Segment" in type(head).__name__}
            for record in make_images(count=count, size=size)
        ]
        for source, head in model.heads.items()
    }
