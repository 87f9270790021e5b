"""Does memory grow? Thousands of steps of the real engine, squeezing online, on a tiny model and tiny data.

Everything that runs in a long training runs here: loader, hooks, metrics, TensorBoard, checkpoints, weight averaging.
Prints the process's memory along the way and its growth per thousand steps after the first tenth, and writes JSON.

    python benchmarks/soak.py [--steps 5000] [--output benchmarks/results/soak.json]

Ctrl-C ends it early, with the result up to there.
"""

import argparse
import json
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import yaml
from PIL import Image

from xlearner_d2 import load_config
from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.stopping import RunStopped
from xlearner_d2.engine.trainer import expand

ROOT = Path(__file__).resolve().parents[1]
SIZE, COUNT, CLASSES = 32, 12, ("a", "b", "c")


def write_data(root: Path) -> None:
    """An image folder of noise."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = root / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def config(root: Path, steps: int) -> dict[str, Any]:
    """One source on a ResNet-50 of a few channels."""
    head = str(ROOT / "configs/heads/classifier.yaml")
    pics = {"TASK": "classification", "CONFIG": head, "TRAIN": ["soak_pics"], "IMS_PER_BATCH": 2}
    return {
        "_BASE_": str(ROOT / "configs/base.yaml"),
        "MODEL": {"RESNETS": {"STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 16}},
        "XLEARNER": {
            "DATASETS": {"soak_pics": {"FORMAT": "image_folder", "IMAGES": str(root)}},
            "SOURCES": {"pics": {**pics, "OPTS": ["INPUT.CLASSIFICATION.SIZE", SIZE]}},
            "SQUEEZE": {"ONLINE": True, "EMA_DECAY": 0.999, "BN_RECALIBRATION_BATCHES": 1},
        },
        "SOLVER": {"MAX_ITER": steps, "CHECKPOINT_PERIOD": max(steps // 10, 1), "AMP": {"ENABLED": False}},
        "DATALOADER": {"NUM_WORKERS": 0},
        "OUTPUT_DIR": str(root.parent / "out"),
    }


def memory_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, MB) as the run logged it."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(line["iteration"] + 1, 1000 * line["memory_gb"]) for line in lines if "memory_gb" in line]


def growth(curve: list[tuple[int, float]]) -> float:
    """MB per thousand steps after the first tenth, by least squares."""
    steps, memory = np.array([point for point in curve if point[0] > 0.1 * curve[-1][0]]).T
    return 1000 * float(np.polyfit(steps, memory, 1)[0])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root / "data")
        (root / "config.yaml").write_text(yaml.safe_dump(config(root / "data", args.steps)))
        with suppress(RunStopped):
            expand(make_plan(load_config(root / "config.yaml"), world_size=1), resume_run=False)
        curve = memory_curve(root / "out/expand")
    for step, memory in curve[:: max(len(curve) // 10, 1)]:
        print(f"step {step:6d}  {memory:7.1f} MB")
    print(f"growth {growth(curve):+.2f} MB per 1000 steps")
    result = {
        "command": f"python benchmarks/soak.py --steps {args.steps}",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "steps": curve[-1][0],
        "growth_mb_per_1000_steps": round(growth(curve), 3),
        "curve_mb": [(step, round(memory, 1)) for step, memory in curve[:: max(len(curve) // 50, 1)]],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
