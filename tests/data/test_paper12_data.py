"""The records of configs/transfer/paper12.yaml against tiny copies of all twelve sets in their usual places."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from builtin_data import OBJECT, save_image
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from public_data import SETS, lines, write_faces

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.check import check_records, check_same_classes
from xlearner_d2.evaluation.build import build_evaluator
from xlearner_d2.specs import ConfigError, DatasetSpec, parse_datasets

CONFIG = Path(__file__).resolve().parents[2] / "configs/transfer/paper12.yaml"


@pytest.fixture(scope="module")
def specs() -> list[DatasetSpec]:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    problems: list[str] = []
    found = parse_datasets(config.get("XLEARNER", config)["DATASETS"], problems)
    assert problems == []
    return found


def write_voc(root: Path, year: str, splits: dict[str, str]) -> None:
    """An image per split, with a box, and a label PNG in both years."""
    folder = root / f"VOC{year}"
    for split, name in splits.items():
        save_image(folder / f"JPEGImages/{name}.jpg")
        lines(folder / f"ImageSets/Main/{split}.txt", [name])
        size = "<size><width>12</width><height>8</height></size>"
        lines(
            folder / f"Annotations/{name}.xml", [f"<annotation>{size}{OBJECT.format('dog', 1, 2, 12, 8)}</annotation>"]
        )
        (folder / "SegmentationClassAug").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 12), 20, np.uint8)).save(folder / f"SegmentationClassAug/{name}.png")


@pytest.fixture(scope="module")
def root(specs: list[DatasetSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sets, of which the classification images are empty files; registered."""
    root = tmp_path_factory.mktemp("paper12")
    with pytest.MonkeyPatch.context() as patch:
        for dataset in {spec.dataset for spec in specs} & SETS.keys():
            SETS[dataset][0](root, patch)
        write_faces(root)
        write_voc(root, "2007", {"trainval": "000005", "test": "000001"})
        write_voc(root, "2012", {"trainval": "2007_000027", "val": "2007_000033"})
        lists = root / "VOC2012/ImageSets/Segmentation"
        lines(lists / "train_aug.txt", ["/JPEGImages/2007_000027.jpg /SegmentationClassAug/2007_000027.png"])
        lines(lists / "val.txt", ["2007_000033"])
        register_datasets(specs, root)
    return root


def test_every_set_has_the_classes_it_should(specs: list[DatasetSpec], root: Path) -> None:
    found = {spec.name: MetadataCatalog.get(spec.name) for spec in specs}
    keys = ("classes", "thing_classes", "stuff_classes")
    counts = {name: len(next(meta.get(key) for key in keys if meta.get(key))) for name, meta in found.items()}
    expected = {"cifar10": 10, "cifar100": 100, "food101": 101, "pets37": 37, "flowers102": 102, "sun397": 397}
    expected |= {"cars196": 196, "dtd47": 47, "caltech101": 101, "voc07": 20, "voc12": 20, "widerface": 1}
    expected |= {"voc12_aug": 21}
    assert {name.rpartition("_")[0]: count for name, count in counts.items()} == expected
    assert len(specs) == 25


def test_train_and_test_agree(specs: list[DatasetSpec], root: Path) -> None:
    families: dict[str, list[str]] = {}
    for spec in specs:
        family = "voc" if spec.format == "voc" else spec.name.rpartition("_")[0]
        families.setdefault(family, []).append(spec.name)
    assert len(families) == 12
    for names in families.values():
        assert len(names) >= 2
        assert check_same_classes(names) == []


def test_records_of_boxes_and_masks_are_right(specs: list[DatasetSpec], root: Path) -> None:
    for spec in specs:
        if spec.format != "torchvision" or spec.dataset == "WIDERFace":
            records = DatasetCatalog.get(spec.name)
            assert check_records(spec.name, records, MetadataCatalog.get(spec.name), max_images=-1) == []


@pytest.mark.parametrize("name", ["voc07_test", "widerface_val", "voc12_aug_val", "cifar10_test"])
def test_evaluators_are_found(name: str, root: Path) -> None:
    build_evaluator(name, output_dir=None).reset()


def test_without_any_data_every_record_has_a_problem(specs: list[DatasetSpec], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        register_datasets(specs, tmp_path)
    named = {problem.split("'")[1] for problem in error.value.problems}
    assert named == {spec.name for spec in specs}
