"""The joint loader against a plain PyTorch loader with Detectron2's mapper, on the same JPEG files."""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper, MetadataCatalog
from models import make_config
from PIL import Image
from timing import ratio

from xlearner_d2.data.mappers import SourceMapper, build_mapper
from xlearner_d2.modeling.heads import head_config
from xlearner_d2.specs import SourceSpec

HEIGHT, WIDTH, IMAGES = 480, 640, 16


def write_images(folder: Path) -> list[dict[str, Any]]:
    """Records of photograph-like files with six boxes each."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) + rng.normal(
            0, 6, (HEIGHT, WIDTH, 3)
        )
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        boxes = [{"bbox": [20, 30, 200, 150], "bbox_mode": 1, "category_id": 0, "iscrowd": 0} for _ in range(6)]
        record = {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "image_id": number, "annotations": boxes}
        records.append(record)
    return records


def loader(args: Namespace) -> dict[str, dict[str, float]]:
    """Processor time to read and map all images, ours against stock; above 1, ours is slower."""
    cfg = make_config(("RetinaNet",))
    source = SourceSpec(name="source0", task="task0", config=cfg.XLEARNER.SOURCES.source0.CONFIG, train=("benchmark",))
    MetadataCatalog.get("benchmark")
    head = head_config(source, cfg)
    ours, stock = SourceMapper("source0", build_mapper(head, is_train=True)), DatasetMapper(head, is_train=True)
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    with TemporaryDirectory() as folder:
        records = write_images(Path(folder))
        for _round in range(args.rounds + 1):
            start = process_time()
            for seed, record in enumerate(records):
                ours(record, seed)
            middle = process_time()
            for record in records:
                stock(record)
            times["ours"].append(1000 * (middle - start) / IMAGES)
            times["stock"].append(1000 * (process_time() - middle) / IMAGES)
    return {"640 x 480 JPEG": ratio(np.array(times["ours"][1:]), np.array(times["stock"][1:]))}
