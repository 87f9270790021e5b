# Purpose: configs/quick/real.yaml as a LazyConfig: the same settings, written in Python.
# Data: that of configs/quick/real.yaml, under $DETECTRON2_DATASETS; datasets/README.md shows the layout of each format.
# Command: python train_net.py --config-file configs/lazy/real.py
# Cost: as configs/quick/real.yaml. Detectron2's lazyconfig_train_net.py takes this file, too, for the expansion.
from xlearner_d2.lazy import complete, expansion


def _both(name, make, **others):
    """A data set's training and validation images."""
    return {f"{name}_{split}": make(split, **others) for split in ("train", "val")}


def _folders(split, *, root):
    return dict(FORMAT="image_folder", IMAGES=f"{root}/{split}", CLASSES=f"{root}/classes.txt")


def _boxes(split, *, root):
    return dict(FORMAT="coco", IMAGES=f"{root}/{split}", ANNOTATIONS=f"{root}/annotations/instances_{split}.json")


def _areas(split, *, images, labels, classes):
    return dict(FORMAT="sem_seg", IMAGES=images.format(split), LABELS=labels.format(split), CLASSES=classes)


_CAMVID = "upstream/seg_camvid11"
_COCO = "upstream/multi_coco256"
_CROPS = ["INPUT.CLASSIFICATION.SIZE", 128]


def _source(task, head, data, images, **others):
    config = f"configs/heads/{head}.yaml"
    return dict(TASK=task, CONFIG=config, TRAIN=[f"{data}_train"], TEST=[f"{data}_val"], IMS_PER_BATCH=images, **others)


settings = complete(
    "configs/base.yaml",
    dict(
        MODEL=dict(RESNETS=dict(DEPTH=18, RES2_OUT_CHANNELS=64)),
        XLEARNER=dict(
            DATASETS={
                **_both("cls_caltech99", _folders, root="upstream/cls_caltech99"),
                **_both("cls_clothing10", _folders, root="upstream/cls_clothing10"),
                **_both("det_aquarium7", _boxes, root="upstream/det_aquarium7"),
                **_both("inst_facade10", _boxes, root="upstream/inst_facade10"),
                **_both(
                    "seg_camvid11",
                    _areas,
                    images=f"{_CAMVID}/images/{{}}",
                    labels=f"{_CAMVID}/masks/{{}}",
                    classes=f"{_CAMVID}/classes.txt",
                ),
                **_both(
                    "coco_super27",
                    _areas,
                    images=f"{_COCO}/{{}}",
                    labels=f"{_COCO}/super27/{{}}",
                    classes=f"{_COCO}/super27/classes.txt",
                ),
                **_both("cls_pets3", _folders, root="downstream/cls_pets3"),
                **_both("cls_signdigits10", _folders, root="downstream/cls_signdigits10"),
            },
            SOURCES=dict(
                caltech=_source("classification", "classifier", "cls_caltech99", 24, OPTS=_CROPS),
                clothing=_source("classification", "classifier", "cls_clothing10", 8, OPTS=_CROPS),
                aquarium=_source("detection", "light_faster_rcnn_fpn", "det_aquarium7", 8),
                facade=_source("detection", "light_mask_rcnn_fpn", "inst_facade10", 4),
                camvid=_source("segmentation", "light_semantic_fpn", "seg_camvid11", 4),
                coco=_source("segmentation", "light_semantic_fpn", "coco_super27", 4),
            ),
            PROBES={
                "pets": dict(TRAIN="cls_pets3_train", TEST="cls_pets3_val"),
                "sign digits": dict(TRAIN="cls_signdigits10_train", TEST="cls_signdigits10_val"),
            },
            SQUEEZE=dict(SOLVER=dict(MAX_ITER=150)),
        ),
        SOLVER=dict(MAX_ITER=600, WARMUP_ITERS=50, CHECKPOINT_PERIOD=200),
        OUTPUT_DIR="output/real",
    ),
)

model, dataloader, optimizer, lr_multiplier, train = expansion()
