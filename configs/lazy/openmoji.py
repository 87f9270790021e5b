# Purpose: configs/quick/openmoji.yaml as a LazyConfig: the same settings, written in Python.
# Data: python datasets/prepare_openmoji.py
# Command: python train_net.py --config-file configs/lazy/openmoji.py
# Cost: as configs/quick/openmoji.yaml. Detectron2's lazyconfig_train_net.py takes this file, too, for the expansion.
from xlearner_d2.lazy import complete, expansion

_ROOT = "openmoji"
_LICENSE = "CC BY-SA 4.0"


def _folders(name, split):
    """A classification set: one folder per class."""
    return dict(
        FORMAT="image_folder",
        IMAGES=f"{_ROOT}/{name}/{split}",
        CLASSES=f"{_ROOT}/{name}/classes.txt",
        LICENSE=_LICENSE,
    )


def _boxes(name, split):
    """A detection set: COCO's json."""
    annotations = f"{_ROOT}/{name}/annotations/instances_{split}.json"
    return dict(FORMAT="coco", IMAGES=f"{_ROOT}/{name}/{split}", ANNOTATIONS=annotations, LICENSE=_LICENSE)


def _areas(name, split):
    """A segmentation set: a label PNG per image."""
    return dict(
        FORMAT="sem_seg",
        IMAGES=f"{_ROOT}/{name}/images/{split}",
        LABELS=f"{_ROOT}/{name}/masks/{split}",
        CLASSES=f"{_ROOT}/{name}/classes.txt",
        LICENSE=_LICENSE,
    )


_SETS = {"up_cls": _folders, "up_det": _boxes, "up_seg": _areas}
_SIZE = 96
_CROPS = ["INPUT.CLASSIFICATION.SIZE", _SIZE, "INPUT.CLASSIFICATION.SCALE", [0.5, 1.0]]
_RESIZED = ["INPUT.MIN_SIZE_TRAIN", [_SIZE], "INPUT.MIN_SIZE_TEST", _SIZE]


def _source(task, head, name, images, opts):
    return dict(
        TASK=task,
        CONFIG=f"configs/heads/{head}.yaml",
        TRAIN=[f"{name}_train"],
        TEST=[f"{name}_val"],
        IMS_PER_BATCH=images,
        OPTS=opts,
    )


settings = complete(
    "configs/base.yaml",
    dict(
        MODEL=dict(RESNETS=dict(DEPTH=18, RES2_OUT_CHANNELS=64)),
        XLEARNER=dict(
            DATASETS={
                **{f"{name}_{split}": make(name, split) for name, make in _SETS.items() for split in ("train", "val")},
                **{f"food_{split}": _folders("down_cls_food", split) for split in ("train", "val")},
            },
            SOURCES=dict(
                icons=_source("classification", "classifier", "up_cls", 24, _CROPS),
                scenes=_source("detection", "light_mask_rcnn_fpn", "up_det", 8, _RESIZED),
                areas=_source("segmentation", "light_semantic_fpn", "up_seg", 8, _RESIZED),
            ),
            PROBES=dict(food=dict(TRAIN="food_train", TEST="food_val", IMAGE_SIZE=_SIZE)),
            SQUEEZE=dict(SOLVER=dict(MAX_ITER=100)),
        ),
        SOLVER=dict(MAX_ITER=200, WARMUP_ITERS=30, CHECKPOINT_PERIOD=100),
        OUTPUT_DIR="output/openmoji",
    ),
)

model, dataloader, optimizer, lr_multiplier, train = expansion()
