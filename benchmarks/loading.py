"""The joint loader against a plain PyTorch loader with Detectron2's mapper, on the same JPEG files."""

import copy
import resource
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper, MetadataCatalog
from models import make_config
from PIL import Image
from timing import ratio
from torch.utils.data import DataLoader, Dataset

from xlearner_d2.data.mappers import SourceMapper, build_mapper
from xlearner_d2.data.packing import PackingLoader
from xlearner_d2.modeling.heads import head_config
from xlearner_d2.specs import SourceSpec

HEIGHT, WIDTH, IMAGES = 480, 640, 16
BATCHES, BATCH_SIZE = 100, 24


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
    """Processor time to map an image, and to send a batch to the process that trains, ours against stock."""
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
        mapped = [ours(record, seed) for seed, record in enumerate(records)]
    return {
        "640 x 480 JPEG": ratio(np.array(times["ours"][1:]), np.array(times["stock"][1:])),
        f"{BATCH_SIZE} images with boxes, from a process": sending(mapped, rounds=args.rounds),
    }


class _Again(Dataset[Any]):
    """Copies of a few items: what was sent already would cost less to send again."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    def __len__(self) -> int:
        return BATCHES * BATCH_SIZE

    def __getitem__(self, index: int) -> Any:
        return copy.deepcopy(self._items[index % len(self._items)])


def sending(items: Sequence[Any], *, rounds: int) -> dict[str, float]:
    """Milliseconds of both processes for a batch, without those that its copies take, but with the start and the end of
    the process that sends."""
    times: dict[type[DataLoader[Any]], list[float]] = {PackingLoader: [], DataLoader: []}
    data = _Again(items)
    for _round in range(rounds + 1):
        start = _processor_time()
        for index in range(len(data)):
            data[index]
        copies = _processor_time() - start
        for kind, found in times.items():
            start = _processor_time()
            for _batch in kind(data, batch_size=BATCH_SIZE, collate_fn=list, num_workers=1):
                pass
            found.append(1000 * (_processor_time() - start - copies) / BATCHES)
    return ratio(np.array(times[PackingLoader][1:]), np.array(times[DataLoader][1:]))


def _processor_time() -> float:
    """Seconds of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
