"""What one source costs: a training step of XLearner with one source against stock Detectron2 on the same model.

Both train the same architecture on the same images with Detectron2's SimpleTrainer, in turn within one process, so the
ratio holds on a noisy machine. Prints the median ratio of paired steps with its quartiles, and writes JSON.

    python benchmarks/one_source_step.py [--steps 30] [--output benchmarks/results/one_source_step.json]
"""

import argparse
import itertools
import json
import os
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from xlearner_d2 import add_xlearner_config
from xlearner_d2.engine.optimizer import make_optimizer
from xlearner_d2.modeling.heads import head_config
from xlearner_d2.specs import SourceSpec

HEADS = {
    "classifier": "configs/heads/classifier.yaml",
    "semantic FPN": "configs/heads/light_semantic_fpn.yaml",
    "Faster R-CNN FPN": "configs/heads/light_faster_rcnn_fpn.yaml",
}
CLASSES = ["a", "b", "c", "d"]


def make_config(head: str) -> CfgNode:
    """A config of one source of that head, on ResNet-18."""
    names = {"classes": CLASSES, "thing_classes": CLASSES, "stuff_classes": CLASSES, "ignore_label": 255}
    MetadataCatalog.get("benchmark").set(**names)
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "XLearner"
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
    # Stock Detectron2 has neither of the next two; without them only the project's own overhead is left.
    cfg.XLEARNER.CHANNELS_LAST = False
    cfg.SOLVER.AMP.ENABLED = False
    cfg.XLEARNER.SOURCES.only = CfgNode({"TASK": "task", "CONFIG": HEADS[head], "TRAIN": ["benchmark"]})
    return cfg


def make_images(head: str, count: int, size: int) -> list[dict[str, Any]]:
    """Random images with labels for any head."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(count):
        corners = torch.randint(0, size // 2, (4, 2), generator=generator).float()
        boxes = Boxes(torch.cat([corners, corners + size // 3], dim=1))
        record: dict[str, Any] = {"image": torch.randint(0, 256, (3, size, size), generator=generator).byte()}
        record |= {"height": size, "width": size, "category_id": 1}
        record["instances"] = Instances((size, size), gt_boxes=boxes, gt_classes=torch.arange(4))
        if head == "semantic FPN":
            record["sem_seg"] = torch.randint(0, len(CLASSES), (size, size), generator=generator)
        records.append(record)
    return records


def make_trainers(head: str, images: list[dict[str, Any]]) -> tuple[SimpleTrainer, SimpleTrainer]:
    """(XLearner's trainer, stock Detectron2's) of models with equally many parameters."""
    cfg = make_config(head)
    ours = build_model(cfg)
    source = SourceSpec(name="only", task="task", config=HEADS[head], train=("benchmark",))
    alone = head_config(source, cfg).clone()
    alone.defrost()
    alone.MODEL.BACKBONE.FREEZE_AT = 0
    stock = build_model(alone)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())
    trainers = []
    for model, batch in ((ours, {"only": images}), (stock, images)):
        trainers.append(SimpleTrainer(model, itertools.repeat(batch), make_optimizer(cfg, model)))
    return trainers[0], trainers[1]


def measure(head: str, *, steps: int, warmup: int, count: int, size: int) -> dict[str, float]:
    """Median step times (ms) of both and quartiles of the paired ratio."""
    trainers = make_trainers(head, make_images(head, count, size))
    times: list[list[float]] = [[], []]
    with EventStorage():
        for step in range(steps + warmup):
            for which in (0, 1) if step % 2 else (1, 0):
                trainers[which].iter = step
                torch.manual_seed(step)  # proposals are sampled at random
                start = perf_counter()
                trainers[which].run_step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[which].append(1000 * (perf_counter() - start))
    ours, stock = (np.array(found[warmup:]) for found in times)
    low, middle, high = np.percentile(ours / stock, [25, 50, 75])
    result = {"ours_ms": np.median(ours), "stock_ms": np.median(stock)}
    result |= {"ratio": middle, "ratio_q1": low, "ratio_q3": high}
    return {key: round(float(value), 4) for key, value in result.items()}


def main() -> None:
    """Measure every head and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="measured pairs of steps")
    parser.add_argument("--warmup", type=int, default=5, help="pairs that are not counted")
    parser.add_argument("--images", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = {}
    for head in HEADS:
        found = measure(head, steps=args.steps, warmup=args.warmup, count=args.images, size=args.size)
        results[head] = found
        spread = f"{found['ratio_q1']:.3f} to {found['ratio_q3']:.3f}"
        times = f"{found['ours_ms']:.0f} ms against {found['stock_ms']:.0f} ms"
        print(f"{head}: ratio {found['ratio']:.3f} (quartiles {spread}); {times}", flush=True)
    if args.output:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "heads": results}, indent=2))


if __name__ == "__main__":
    main()
