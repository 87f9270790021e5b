"""Public sets in torchvision's layouts: right for good ones, judged by torchvision itself, and clear about bad ones."""

import pickle
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_data import read
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from public_data import SETS, trust, write_caltech, write_cifar, write_gtsrb, write_svhn
from torchvision import datasets

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.builtin.class_splits import split_by_class
from xlearner_d2.data.builtin.torchvision_files import make_once
from xlearner_d2.data.check import check_records, check_same_classes
from xlearner_d2.data.classification import ClassificationMapper
from xlearner_d2.evaluation.probe import _CentreCrops
from xlearner_d2.specs import ConfigError, DatasetSpec

Records = list[dict[str, Any]]
#: Where an image's path has the name of its class, as torchvision spells it.
NAME_OF: dict[str, Callable[[str], str]] = {
    "SUN397": lambda path: "/".join(Path(path).parts[2:-1]),
    "EuroSAT": lambda path: Path(path).parent.name,
    "Caltech101": lambda path: Path(path).parent.name,
    "OxfordIIITPet": lambda path: " ".join(Path(path).name.split("_")[:2]),
    "CIFAR10": lambda path: Path(path).parent.name,
}


def spec_of(dataset: str, split: str, **values: Any) -> DatasetSpec:
    return DatasetSpec(name=f"x_{dataset}_{split}", format="torchvision", dataset=dataset, split=split, **values)


def read_splits(dataset: str, root: Path) -> dict[str, Records]:
    return {split: read(spec_of(dataset, split), root) for split in SETS[dataset][1]}


def refused(spec: DatasetSpec, root: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read(spec, root)
    assert all(f"data set {spec.name!r}: " in problem for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize("dataset", SETS)
def test_every_set_and_split(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, sizes = SETS[dataset]
    write(tmp_path, monkeypatch)
    splits = read_splits(dataset, tmp_path)
    assert {split: len(records) for split, records in splits.items()} == sizes
    names = [f"x_{dataset}_{split}" for split in sizes]
    assert check_same_classes(names) == []
    metadata = MetadataCatalog.get(names[0])
    assert metadata.evaluator_type == "classification"
    for records in splits.values():
        assert {record["category_id"] for record in records} == set(range(len(metadata.classes)))
        assert all(record["file_name"] == str(tmp_path / record["image_id"]) for record in records)
        assert all(Path(record["file_name"]).is_file() for record in records)
        if dataset in NAME_OF:
            found = [metadata.classes[record["category_id"]] for record in records]
            assert found == [NAME_OF[dataset](record["image_id"]) for record in records]
    splits.pop("trainval" if dataset == "FGVCAircraft" else "", None)
    counts = Counter(record["image_id"] for records in splits.values() for record in records)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("dataset", ["Food101", "Flowers102", "StanfordCars", "DTD", "FGVCAircraft"])
def test_labels_equal_torchvision(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SETS[dataset][0](tmp_path, monkeypatch)
    for split, records in read_splits(dataset, tmp_path).items():
        oracle = getattr(datasets, dataset)(tmp_path, split=split, loader=str)
        assert [(record["file_name"], record["category_id"]) for record in records] == list(map(tuple, oracle))
        assert list(MetadataCatalog.get(f"x_{dataset}_{split}").classes) == list(oracle.classes)


def test_gtsrb_labels(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    train, test = (read(spec_of("GTSRB", split), tmp_path) for split in ("train", "test"))
    assert all(int(Path(record["file_name"]).parent.name) == record["category_id"] for record in train)
    assert [record["category_id"] for record in test] == list(range(42, -1, -1))


def test_splits_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SETS["DTD"][0](tmp_path, monkeypatch)
    splits = read_splits("DTD", tmp_path)
    assert read(spec_of("DTD", "train+val"), tmp_path) == splits["train"] + splits["val"]


def test_root_is_that_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SETS["EuroSAT"][0](tmp_path / "deep/down", monkeypatch)
    records = read(spec_of("EuroSAT", "train", root="deep/down"), tmp_path)
    assert records[0]["file_name"].startswith(str(tmp_path / "deep/down/eurosat/2750/AnnualCrop/"))
    shutil.move(tmp_path / "deep/down/eurosat", tmp_path)
    moved = read(spec_of("EuroSAT", "train"), tmp_path)
    assert [record["image_id"] for record in moved] == [record["image_id"] for record in records]


# --- sets without a split of their own ------------------------------------------------------------------------------

LABELS = st.lists(st.integers(4, 12), min_size=1, max_size=4)


@given(LABELS, st.randoms(use_true_random=False))
def test_split_by_class(counts: list[int], random: Any) -> None:
    """Parts have the sizes that were asked for, share nothing, and do not depend on the order of the images."""
    samples = [(f"{label}/{number}.jpg", label) for label, count in enumerate(counts) for number in range(count)]
    shuffled = random.sample(samples, len(samples))
    train, test = (split_by_class(shuffled, lambda count: (2, count - 3), split=split) for split in ("train", "test"))
    assert Counter(label for _, label in train) == dict.fromkeys(range(len(counts)), 2)
    assert Counter(label for _, label in test) == {label: count - 3 for label, count in enumerate(counts)}
    assert not set(train) & set(test)
    assert set(train) | set(test) <= set(samples)
    assert train == split_by_class(samples, lambda count: (2, count - 3), split="train")
    assert train == sorted(train, key=lambda sample: (sample[1], sample[0]))


def test_split_by_class_does_not_follow_the_file_names() -> None:
    train = split_by_class([(f"{number}.jpg", 0) for number in range(20)], lambda count: (10, 10), split="train")
    assert train != sorted([(f"{number}.jpg", 0) for number in range(20)])[:10]


@pytest.mark.parametrize("rule", [lambda count: (3, 3), lambda count: (5, 0), lambda count: (6, -1)])
def test_too_few_images_of_a_class(rule: Callable[[int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"class 7 has 5 images, but at least . \+ . are needed"):
        split_by_class([(f"{number}.jpg", 7) for number in range(5)], rule, split="train")


def test_caltech_with_a_class_too_small(tmp_path: Path) -> None:
    write_caltech(tmp_path)
    folder = tmp_path / "caltech101/101_ObjectCategories/thing_003"
    for number in range(31, 33):
        (folder / f"image_{number:04d}.jpg").unlink()
    message = refused(spec_of("Caltech101", "test"), tmp_path)
    assert "class 3 has 30 images, but at least 30 + 1 are needed" in message
    assert "Is it complete?" in message


# --- sets that are unpacked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100", "SVHN"])
def test_unpacked_images_equal_torchvision(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SETS[dataset][0](tmp_path, monkeypatch)
    for split, records in read_splits(dataset, tmp_path).items():
        options = {"split": split} if dataset == "SVHN" else {"train": split == "train"}
        oracle = getattr(datasets, dataset)(tmp_path, **options)
        assert len(records) == len(oracle)
        for record, (image, label) in zip(records, oracle, strict=True):
            assert record["category_id"] == label
            assert Path(record["file_name"]).suffix == ".png"
            assert (utils.read_image(record["file_name"], "RGB") == np.asarray(image)).all()
        classes = MetadataCatalog.get(f"x_{dataset}_{split}").classes
        assert classes == (list(map(str, range(10))) if dataset == "SVHN" else oracle.classes)


def test_unpacked_pixels_equal_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a file are the red, green and blue planes of an image."""
    pixels = write_cifar(tmp_path, monkeypatch)
    first = utils.read_image(read(spec_of("CIFAR10", "test"), tmp_path)[0]["file_name"], "RGB")
    assert (first.transpose(2, 0, 1).ravel() == pixels["test_batch"][0]).all()


def test_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    spec = spec_of("SVHN", "test")
    records = read(spec, tmp_path)
    times = [Path(record["file_name"]).stat().st_mtime_ns for record in records]
    (tmp_path / "test_32x32.mat").unlink()
    assert read(spec, tmp_path) == records
    assert [Path(record["file_name"]).stat().st_mtime_ns for record in records] == times


def test_only_one_of_several_processes_makes_a_folder(tmp_path: Path) -> None:
    """Threads here: the lock is on an open file, of which each has its own."""
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.3)
        (folder / "done").touch()

    def wait(_: int) -> bool:
        return (make_once(spec_of("SVHN", "test"), tmp_path / "cache/test", make) / "done").is_file()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wait, range(4))) == [True] * 4
    assert len(made) == 1


def test_unpacking_starts_again_after_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    cache = tmp_path / "xlearner_cache/SVHN"
    save, saved = Image.Image.save, []

    def stop_at_the_third(image: Image.Image, *args: Any, **options: Any) -> None:
        saved.append(args[0])
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(image, *args, **options)

    monkeypatch.setattr(Image.Image, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        read(spec_of("SVHN", "test"), tmp_path)
    monkeypatch.setattr(Image.Image, "save", save)
    assert (cache / "test.part").is_dir()
    assert not (cache / "test").exists()
    (cache / "test.part/stray").touch()
    records = read(spec_of("SVHN", "test"), tmp_path)
    assert check_records("x", records, MetadataCatalog.get("x_SVHN_test"), max_images=-1) == []
    assert not (cache / "test.part").exists()
    assert not (cache / "test/stray").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "xlearner_cache").write_text("in the way")
    message = refused(spec_of("SVHN", "test"), tmp_path)
    assert "xlearner_cache/SVHN/test, which is written once and then read, cannot be made" in message


def test_a_damaged_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    read(spec_of("SVHN", "test"), tmp_path)
    index = tmp_path / "xlearner_cache/SVHN/test/index.json"
    index.write_text(index.read_text()[:-9])
    assert f"{index} is damaged" in refused(spec_of("SVHN", "test"), tmp_path)
    assert f"Remove {index.parent}" in refused(spec_of("SVHN", "test"), tmp_path)


def test_a_lost_image_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    records = read(spec_of("SVHN", "test"), tmp_path)
    Path(records[4]["file_name"]).unlink()
    (problem,) = check_records("x", records, MetadataCatalog.get("x_SVHN_test"), max_images=-1)
    assert f"{records[4]['file_name']} does not exist" in problem


def test_check_mapper_and_probe_read_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    records = read(spec_of("CIFAR10", "test"), tmp_path)
    assert check_records("x", records, MetadataCatalog.get("x_CIFAR10_test"), max_images=-1) == []
    mapped = ClassificationMapper(image_format="BGR", is_train=False, size=32, crop_pct=1.0)(records[0])
    crop, label = _CentreCrops(records, image_size=32, input_format="BGR")[0]
    assert mapped["image"].shape == crop.shape == (3, 32, 32)
    assert (mapped["image"] == crop).all()
    assert mapped["category_id"] == label


# --- nothing harmful is unpickled -----------------------------------------------------------------------------------


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_harmful_pickle_is_never_opened(
    file: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    harm = tmp_path / "harm"
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(pickle.dumps(Harmful(harm)))
    message = refused(spec_of("CIFAR10", split), tmp_path)
    assert f"{path} is damaged: its MD5 is " in message
    assert "datasets.CIFAR10(" in message
    assert not harm.exists()
    assert not (tmp_path / "xlearner_cache").exists()
    trust(tmp_path, monkeypatch, datasets.CIFAR10)  # the same file does harm once its checksum is accepted
    refused(spec_of("CIFAR10", "train" if file.startswith("data") else "test"), tmp_path)
    assert harm.exists()


@pytest.mark.parametrize("dataset", ["CIFAR100", "SVHN"])
def test_a_truncated_file(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SETS[dataset][0](tmp_path, monkeypatch)
    path = tmp_path / ("cifar-100-python/train" if dataset == "CIFAR100" else "train_32x32.mat")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged: its MD5" in refused(spec_of(dataset, "train"), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "file", "split"),
    [
        ("Flowers102", "flowers-102/setid.mat", "train"),
        ("StanfordCars", "stanford_cars/devkit/cars_train_annos.mat", "train"),
        ("Food101", "food-101/meta/test.json", "test"),
        ("OxfordIIITPet", "oxford-iiit-pet/annotations/test.txt", "test"),
        ("FGVCAircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt", "val"),
    ],
)
def test_a_truncated_table(
    dataset: str, file: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SETS[dataset][0](tmp_path, monkeypatch)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-3])
    message = refused(spec_of(dataset, split), tmp_path)
    assert f"torchvision.datasets.{dataset} cannot read {tmp_path}; some of its files are damaged" in message


# --- what is missing or misspelt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [*SETS, "WIDERFace"])
def test_missing_data_is_one_problem(dataset: str, tmp_path: Path) -> None:
    split = next(iter(SETS[dataset][1])) if dataset in SETS else "val"
    with pytest.raises(ConfigError) as error:
        read(spec_of(dataset, split, root="public"), tmp_path)
    (problem,) = error.value.problems
    assert f"below ROOT {tmp_path / 'public'}. Of this path, {tmp_path} exists" in problem
    if dataset == "StanfordCars":
        assert "torchvision can download this set no more" in problem
    else:
        call = f'datasets.{dataset}("{tmp_path / "public"}"'
        assert f"To download it: python -c 'from torchvision import datasets; {call}" in problem
    assert list(tmp_path.iterdir()) == []


def test_all_missing_splits_are_to_be_downloaded(tmp_path: Path) -> None:
    message = refused(spec_of("SVHN", "train+extra"), tmp_path)
    assert "there is no train_32x32.mat, extra_32x32.mat below" in message
    assert message.count("download=True") == 2
    assert 'split="extra", download=True' in message
    assert 'split="test", download=True' in refused(spec_of("PCAM", "test"), tmp_path)  # which fetches one alone


def test_the_command_of_the_message_is_python(tmp_path: Path) -> None:
    code = refused(spec_of("GTSRB", "test"), tmp_path).split("python -c '")[1].split("'")[0]
    compile(code, "message", "exec")


def test_problems_of_all_sets_come_at_once(tmp_path: Path) -> None:
    specs = [spec_of("CIFAR10", "train"), spec_of("DTD", "train+val"), spec_of("WIDERFace", "train")]
    with pytest.raises(ConfigError) as error:
        register_datasets(specs, tmp_path)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("CIFAR1O", "train", r"DATASET is 'CIFAR1O'\. Did you mean 'CIFAR10'\?"),
        ("WIDERFaces", "train", r"Did you mean 'WIDERFace'\?"),
        ("MNISTX", "train", r"DATASET is 'MNISTX'\."),
        ("CIFAR10", "trian", r"SPLIT is 'trian', but train, test, or several .*expected\. Did you mean 'train'\?"),
        ("DTD", "train+vall", r"SPLIT is 'train\+vall', but train, val, test, .* Did you mean 'val'\?"),
        ("Food101", "", r"SPLIT is '', but train, test, or several joined by \+"),
        ("Food101", "train+train", r"SPLIT is 'train\+train', but each part once is expected"),
        ("OxfordIIITPet", "train", r"SPLIT is 'train', but trainval, test, .* Did you mean 'trainval'\?"),
        ("WIDERFace", "test", r"SPLIT is 'test', but one with boxes is expected: train, val\."),
    ],
)
def test_wrong_names(dataset: str, split: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(spec_of(dataset, split), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "folder", "message"),
    [
        ("EuroSAT", "eurosat/2750/Forest", "there are 9 classes, but 10 are expected"),
        ("Caltech101", "caltech101/101_ObjectCategories/thing_007", "there are 100 classes, but 101 are expected"),
        ("SUN397", "SUN397/a/abbey", "1 of 397 classes have no image: abbey"),
        ("GTSRB", "gtsrb/GTSRB/Training/00005", "1 of 43 classes have no image: 00005"),
    ],
)
def test_a_lost_folder(
    dataset: str, folder: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SETS[dataset][0](tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / folder)
    assert f"{tmp_path}: {message}. Is it complete?" in refused(spec_of(dataset, "train"), tmp_path)
