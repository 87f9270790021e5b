"""The joint loader: the same batches whoever reads them, and a file named when it cannot be read."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from PIL import Image
from torch import Tensor

from xlearner_d2.data.classification import ClassificationMapper
from xlearner_d2.data.loader import JointDataset, build_joint_train_loader, build_test_loader, group_by_source, start_at
from xlearner_d2.data.mappers import SourceMapper
from xlearner_d2.data.samplers import Draw
from xlearner_d2.settings import add_head_config
from xlearner_d2.specs import SourceSpec

Records = list[dict[str, Any]]

SOURCES = [
    SourceSpec(name="pics", task="classification", config="", train=("x",), ims_per_batch=4),
    SourceSpec(name="boxes", task="detection", config="", train=("y",), ims_per_batch=2),
]


@pytest.fixture
def heads() -> dict[str, CfgNode]:
    """A classifier with every augmentation, and a detector."""

    def make(*opts: Any) -> CfgNode:
        cfg = get_cfg()
        add_head_config(cfg)
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "INPUT.CLASSIFICATION.SIZE", 32, *opts])
        return cfg

    small = ["INPUT.MIN_SIZE_TRAIN", (40, 48), "INPUT.MIN_SIZE_TEST", 48, "INPUT.CROP.ENABLED", True]
    return {
        "pics": make("MODEL.META_ARCHITECTURE", "ImageClassifier", "INPUT.CLASSIFICATION.AUTO_AUGMENT", "rand-m9"),
        "boxes": make(*small),
    }


@pytest.fixture
def records(tmp_path: Path) -> dict[str, Records]:
    generator = np.random.default_rng(0)
    found: dict[str, Records] = {"pics": [], "boxes": []}
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype="uint8")).save(path)
        record = {"file_name": str(path), "image_id": number, "height": 40, "width": 56}
        box = {"bbox": [4, 4, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
        found["pics"].append({**record, "category_id": number % 3})
        found["boxes"].append({**record, "annotations": [box]})
    return found


def batches(heads: Any, records: Any, count: int = 5, *, start: int = 0, **options: Any) -> list[dict[str, Records]]:
    loader = build_joint_train_loader(SOURCES, heads, records, **{"seed": 0, "num_workers": 0, **options})
    start_at(loader, start)
    return list(islice(loader, count))


def tensors(found: list[dict[str, Records]]) -> Iterator[tuple[str, Any, Tensor]]:
    """(source, image id, image) of each record, in order."""
    for batch in found:
        for source, items in batch.items():
            for item in items:
                yield source, item["image_id"], item["image"]


def assert_equal(first: list[dict[str, Records]], second: list[dict[str, Records]]) -> None:
    for (*key, image), (*other_key, other) in zip(tensors(first), tensors(second), strict=True):
        assert key == other_key
        assert torch.equal(image, other)


def test_batch_has_each_sources_share_with_its_stamp(heads: Any, records: Any) -> None:
    for batch in batches(heads, records):
        assert {source: len(items) for source, items in batch.items()} == {"pics": 4, "boxes": 2}
        assert all(item["source"] == source for source, items in batch.items() for item in items)
        assert all(item["image"].dtype == torch.uint8 for items in batch.values() for item in items)
        assert all(item["image"].shape == (3, 32, 32) for item in batch["pics"])
        assert all(len(item["instances"]) <= 1 for item in batch["boxes"])


def test_workers_change_nothing(heads: Any, records: Any) -> None:
    alone, together = batches(heads, records), batches(heads, records, num_workers=2)
    assert_equal(alone, together)
    for first, second in zip(alone, together, strict=True):
        for mine, other in zip(first["boxes"], second["boxes"], strict=True):
            assert torch.equal(mine["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)


def test_resumed_loader_gives_the_tail(heads: Any, records: Any) -> None:
    assert_equal(batches(heads, records, 2, start=3), batches(heads, records, 5)[3:])


def test_random_state_of_the_caller_has_no_influence(heads: Any, records: Any) -> None:
    first = batches(heads, records)
    torch.manual_seed(1)
    np.random.seed(1)
    assert_equal(first, batches(heads, records))


def test_random_state_of_the_caller_stays(heads: Any, records: Any) -> None:
    """Also while its own process reads, as the model draws from it."""

    def drawn() -> tuple[float, ...]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    expected = drawn()
    seed()
    batches(heads, records)
    assert drawn() == expected


def test_augmentation_is_random(heads: Any, records: Any) -> None:
    """The same image looks different in each epoch, and with another seed."""
    by_image: dict[Any, set[bytes]] = {}
    found = [*tensors(batches(heads, records, 5)), *tensors(batches(heads, records, 5, seed=1))]
    for source, number, image in found:
        by_image.setdefault((source, number), set()).add(image.numpy().tobytes())
    assert len([looks for (source, _), looks in by_image.items() if source == "pics" and len(looks) > 1]) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["pics", "boxes"])
def test_unreadable_image_names_source_and_file(heads: Any, records: Any, source: str, num_workers: int) -> None:
    bad = Path(records[source][0]["file_name"]).with_name("bad.png")
    bad.write_bytes(b"no image")
    for record in records[source]:
        record["file_name"] = str(bad)
    with pytest.raises(RuntimeError, match=rf"source '{source}' could not read .*bad\.png: UnidentifiedImageError"):
        batches(heads, records, num_workers=num_workers)


def test_missing_image_names_source_and_file(heads: Any, records: Any) -> None:
    Path(records["pics"][3]["file_name"]).unlink()
    with pytest.raises(RuntimeError, match=r"source '\w+' could not read .*3\.png: FileNotFoundError"):
        batches(heads, records)


def test_source_without_records(heads: Any, records: Any) -> None:
    with pytest.raises(ValueError, match="Source 'boxes' has no images"):
        batches(heads, {**records, "boxes": []})


class Picky:
    """Leaves out all but some records, as mappers of other projects may."""

    def __init__(self, taken: set[int]):
        self.taken = taken

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        return dict(record) if record["image_id"] in self.taken else None


def test_a_record_that_a_mapper_leaves_out_is_replaced() -> None:
    records = [{"file_name": f"{number}.png", "image_id": number} for number in range(10)]
    mapper = SourceMapper("pics", Picky({2, 5}))
    data = JointDataset(records={"pics": records}, mappers={"pics": mapper})
    found = [data[Draw("pics", index, seed)]["image_id"] for index in range(10) for seed in range(8)]
    assert set(found) == {2, 5}
    assert found == [data[Draw("pics", index, seed)]["image_id"] for index in range(10) for seed in range(8)]
    assert data[Draw("pics", 5, 3)] == {**records[5], "source": "pics"}
    nothing = JointDataset(records={"pics": records}, mappers={"pics": SourceMapper("pics", Picky(set()))})
    with pytest.raises(RuntimeError, match=r"source 'pics': its mapper left out 4\.png and 99 other images"):
        nothing[Draw("pics", 4, 0)]


def test_mapper_error_of_a_nameless_record_is_kept() -> None:
    mapper = SourceMapper("pics", ClassificationMapper(image_format="RGB", is_train=False))
    with pytest.raises(RuntimeError, match=r"source 'pics' could not read None: KeyError\('file_name'\)"):
        mapper({}, 0)


def test_grouping_keeps_the_order() -> None:
    drawn = [{"source": "b", "n": 0}, {"source": "a", "n": 1}, {"source": "b", "n": 2}]
    assert group_by_source(drawn) == {"b": [drawn[0], drawn[2]], "a": [drawn[1]]}


def test_test_loader_gives_every_record_in_order(heads: Any, records: Any) -> None:
    for source in ("pics", "boxes"):
        loader = build_test_loader(heads[source], records[source], batch_size=4, num_workers=0)
        assert [item["image_id"] for batch in loader for item in batch] == list(range(10))


def test_test_images_are_not_augmented(heads: Any, records: Any) -> None:
    first, second = (list(build_test_loader(heads["pics"], records["pics"], num_workers=0)) for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for (a,), (b,) in zip(first, second, strict=True))


@pytest.mark.parametrize("is_train", [True, False])
def test_channel_order(tmp_path: Path, is_train: bool) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 40), (255, 0, 0)).save(path)
    found = {}
    for order in ("RGB", "BGR"):
        mapper = ClassificationMapper(image_format=order, is_train=is_train, size=16, color_jitter=0.0)
        found[order] = mapper({"file_name": str(path)})["image"].float().mean((1, 2)).tolist()
    assert found == {"RGB": [255, 0, 0], "BGR": [0, 0, 255]}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_image_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (30, 20)).save(path)
    found = ClassificationMapper(image_format="RGB", is_train=True, size=16)({"file_name": str(path), "category_id": 1})
    assert (found["image"].shape, found["image"].dtype) == ((3, 16, 16), torch.uint8)
    assert (found["height"], found["width"], found["category_id"]) == (20, 30, 1)
