"""Tiny copies of public sets, in the layouts that torchvision.datasets reads; images are empty files unless needed."""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets


def touch(paths: Iterable[Path]) -> None:
    known: set[Path] = set()
    for path in paths:
        if path.parent not in known:
            path.parent.mkdir(parents=True, exist_ok=True)
            known.add(path.parent)
        path.touch()


def lines(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def mat(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_food(root: Path) -> None:
    names = [f"dish_{number:03d}" for number in range(101)]
    for split, numbers in (("train", (2, 1)), ("test", (3,))):
        table = {name: [f"{name}/{number}" for number in numbers] for name in names}
        lines(root / f"food-101/meta/{split}.json", [str(table).replace("'", '"')])
        touch(root / f"food-101/images/{file}.jpg" for files in table.values() for file in files)


def write_pets(root: Path) -> None:
    names = [f"Breed_{number:02d}" for number in range(37)]
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        files = [(f"{name}_{number}", label) for label, name in enumerate(names, 1) for number in numbers]
        lines(root / f"oxford-iiit-pet/annotations/{split}.txt", [f"{file} {label} 1 1" for file, label in files])
        touch(root / f"oxford-iiit-pet/images/{file}.jpg" for file, _ in files)


def write_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    labels = np.arange(306) % 102 + 1
    mat(folder / "imagelabels.mat", labels=labels)
    ids = np.arange(1, 307)
    mat(folder / "setid.mat", trnid=ids[:102], valid=ids[102:204], tstid=ids[204:])
    touch(folder / f"jpg/image_{number:05d}.jpg" for number in ids)
    files = {"image": ("102flowers.tgz", "")}
    files |= {key: (name, md5(folder / name)) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


def write_sun(root: Path) -> None:
    names = ["a/abbey", "a/apartment_building/outdoor", *(f"z/zoo_{number}" for number in range(395))]
    lines(root / "SUN397/ClassName.txt", [f"/{name}" for name in names])
    touch(root / f"SUN397/{name}/sun_{number:03d}.jpg" for name in names for number in range(101))


def write_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    names = np.array([f"Make {number}" for number in range(196)], dtype=object)
    mat(folder / "devkit/cars_meta.mat", class_names=names)
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{number:05d}.jpg", number) for number in range(1, 197)]
        table = np.array(rows, dtype=[("fname", object), ("class", np.uint8)])
        mat(folder / file, annotations=table)
        touch(folder / f"cars_{split}/{name}" for name, _ in rows)


def write_dtd(root: Path) -> None:
    names = [f"texture{number:02d}" for number in range(47)]
    for number, split in enumerate(("train", "val", "test")):
        files = [f"{name}/{name}_{number}.jpg" for name in names]
        lines(root / f"dtd/dtd/labels/{split}1.txt", files)
        touch(root / "dtd/dtd/images" / file for file in files)


def write_caltech(root: Path, *, images: int = 32) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    names = ["BACKGROUND_Google", *(f"thing_{number:03d}" for number in range(101))]
    touch(folder / f"{name}/image_{number:04d}.jpg" for name in names for number in range(1, images + 1))


def write_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    names = [f"Model {number}-x" for number in range(100)]
    lines(folder / "variants.txt", names)
    for number, split in enumerate(("train", "val", "test")):
        files = [(f"{number}{label:03d}", name) for label, name in enumerate(names)]
        lines(folder / f"images_variant_{split}.txt", [f"{file} {name}" for file, name in files])
        touch(folder / f"images/{file}.jpg" for file, _ in files)
    joined = [(folder / f"images_variant_{split}.txt").read_text().strip() for split in ("train", "val")]
    lines(folder / "images_variant_trainval.txt", joined)


def write_eurosat(root: Path) -> None:
    names = ["AnnualCrop", "Forest", "River", *(f"Use{number}" for number in range(7))]
    touch(root / f"eurosat/2750/{name}/{name}_{number}.jpg" for name in names for number in range(10))


def write_gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    touch(folder / f"GTSRB/Training/{label:05d}/0_{number}.ppm" for label in range(43) for number in range(2))
    touch(folder / f"GTSRB/Final_Test/Images/{number:05d}.ppm" for number in range(43))
    lines(
        folder / "GT-final_test.csv", ["Filename;ClassId", *(f"{number:05d}.ppm;{42 - number}" for number in range(43))]
    )


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, *, cls: Any = datasets.CIFAR10) -> dict[str, Any]:
    """Random pixels [images, 3072]; returns those of each file by its name."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    count, key = (10, "labels") if cls is datasets.CIFAR10 else (100, "fine_labels")
    pixels = {}
    for name, _ in (*cls.train_list, *cls.test_list):
        pixels[name] = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.permutation(count).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], key: labels}))
    meta = {cls.meta["key"]: [f"animal {number:02d}" for number in reversed(range(count))]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    trust(root, monkeypatch, cls)
    return pixels


def trust(root: Path, monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    """Make the checksums of the files that are there the right ones."""
    folder = root / cls.base_folder
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(cls, table, [[name, md5(folder / name)] for name, _ in getattr(cls, table)])
    name = cls.meta["filename"]
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(folder / name)})


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {}
    generator = np.random.default_rng(0)
    for split in ("train", "test", "extra"):
        name = f"{split}_32x32.mat"
        labels = generator.permutation(np.arange(1, 11))[:, None]  # 10 means the digit 0
        mat(root / name, X=generator.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8), y=labels)
        table[split] = ["", name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)


def write_pcam(root: Path) -> None:
    """Six images of noise in each split."""
    generator = np.random.default_rng(0)
    arrays = {"images": ("x", (6, 96, 96, 3)), "targets": ("y", (6, 1, 1, 1))}
    (root / "pcam").mkdir()
    for files in datasets.PCAM._FILES.values():
        for key, (name, shape) in arrays.items():
            with h5py.File(root / "pcam" / files[key][0], "w") as file:
                labels = np.arange(6).reshape(shape) % 2 if key == "targets" else None
                file[name] = (generator.integers(0, 256, shape) if labels is None else labels).astype(np.uint8)


#: File -> rows of boxes: x, y, width, height, blur, expression, illumination, invalid, occlusion, pose.
FACES = {
    "0--Parade/a.jpg": ["1 2 3 4 0 0 0 0 0 0", "30 20 20 20 0 0 0 0 0 0", "5 5 2 2 0 0 0 1 0 0"],
    "0--Parade/b.jpg": [],
    "1--Band/c.jpg": ["0 0 0 7 0 0 0 0 0 0", "-2 3 10 6 0 0 0 0 0 0"],
}


def write_faces(root: Path) -> None:
    """Images of 40 x 30 pixels; without a face, the count 0 is followed by a row of zeros."""
    folder = root / "widerface"
    for split in ("train", "val"):
        rows: list[str] = []
        for file, boxes in FACES.items():
            path = folder / f"WIDER_{split}/images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(path)
            rows += [file, str(len(boxes)), *(boxes or ["0 0 0 0 0 0 0 0 0 0"])]
        lines(folder / f"wider_face_split/wider_face_{split}_bbx_gt.txt", rows)


Writer = Callable[[Path, pytest.MonkeyPatch], Any]
#: Class -> how its copy is written, and for each split the number of images.
SETS: dict[str, tuple[Writer, dict[str, int]]] = {
    "CIFAR10": (write_cifar, {"train": 50, "test": 10}),
    "CIFAR100": (lambda root, patch: write_cifar(root, patch, cls=datasets.CIFAR100), {"train": 100, "test": 100}),
    "SVHN": (write_svhn, {"train": 10, "test": 10, "extra": 10}),
    "Food101": (lambda root, patch: write_food(root), {"train": 202, "test": 101}),
    "OxfordIIITPet": (lambda root, patch: write_pets(root), {"trainval": 74, "test": 37}),
    "Flowers102": (write_flowers, {"train": 102, "val": 102, "test": 102}),
    "SUN397": (lambda root, patch: write_sun(root), {"train": 50 * 397, "test": 50 * 397}),
    "StanfordCars": (lambda root, patch: write_cars(root), {"train": 196, "test": 196}),
    "DTD": (lambda root, patch: write_dtd(root), {"train": 47, "val": 47, "test": 47}),
    "Caltech101": (lambda root, patch: write_caltech(root), {"train": 30 * 101, "test": 2 * 101}),
    "FGVCAircraft": (
        lambda root, patch: write_aircraft(root),
        {"train": 100, "val": 100, "trainval": 200, "test": 100},
    ),
    "EuroSAT": (lambda root, patch: write_eurosat(root), {"train": 80, "test": 20}),
    "PCAM": (lambda root, patch: write_pcam(root), {"train": 6, "val": 6, "test": 6}),
    "GTSRB": (lambda root, patch: write_gtsrb(root), {"train": 86, "test": 43}),
}
