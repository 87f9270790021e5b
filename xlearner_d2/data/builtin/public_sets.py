"""The classes of ``torchvision.datasets`` that are used for classification: their splits, files and images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100, PCAM, SVHN

from .class_splits import Rule, Sample
from .torchvision_files import Part


class Labelled(NamedTuple):
    """Class names in order of their index, and the path and class index of each image."""

    classes: list[str]
    samples: list[Sample]


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """How one class of torchvision is used.

    Attributes:
        num_classes: how many classes the complete set has.
        parts: what is read for each split.
        list_images: class names and images of torchvision's data set; None if that holds arrays, to be unpacked.
        options: arguments of the class for every split.
        classes: names, where torchvision has none.
        rule: sizes of the parts of each class, for a set that has no split of its own.
    """

    num_classes: int
    parts: Mapping[str, Part]
    list_images: Callable[[Any], Labelled] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    rule: Rule | None = None


def public_sets() -> dict[str, PublicSet]:
    """All sets by the name of their class."""
    return {
        **{name: PublicSet(num_classes=count, parts=_cifar_parts(cls)) for name, count, cls in _CIFAR},
        "SVHN": PublicSet(num_classes=10, parts=_svhn_parts(), classes=tuple(map(str, range(10)))),
        "PCAM": PublicSet(num_classes=2, parts=_pcam_parts(), classes=("no tumor tissue", "tumor tissue")),
        "OxfordIIITPet": PublicSet(num_classes=37, parts=_PETS, list_images=_list_pets),
        "GTSRB": PublicSet(num_classes=43, parts=_GTSRB, list_images=_list_gtsrb, classes=_SIGNS),
        "Caltech101": PublicSet(num_classes=101, parts=_CALTECH, list_images=_list_caltech, rule=_caltech_rule),
        "Food101": _with_loader(101, _parts("train", "test", needs=("food-101/meta/{}.json", "food-101/images"))),
        "Flowers102": _with_loader(102, _parts("train", "val", "test", needs=_FLOWERS)),
        "StanfordCars": _with_loader(196, _CARS),
        "DTD": _with_loader(47, _parts("train", "val", "test", needs=("dtd/dtd/labels/{}1.txt", "dtd/dtd/images"))),
        "FGVCAircraft": _with_loader(100, _parts("train", "val", "trainval", "test", needs=_AIRCRAFT)),
        "SUN397": _with_loader(397, _no_split("SUN397/ClassName.txt"), lambda count: (50, 50)),
        "EuroSAT": _with_loader(10, _no_split("eurosat/2750"), lambda count: (count * 4 // 5, count - count * 4 // 5)),
    }


def _caltech_rule(count: int) -> tuple[int, int]:
    return 30, count - 30


# --- images ---------------------------------------------------------------------------------------------------------


def _with_loader(num_classes: int, parts: Mapping[str, Part], rule: Rule | None = None) -> PublicSet:
    """A class whose ``loader`` can be ``str``: it then gives the path in place of the image."""
    options = {"loader": str}
    return PublicSet(num_classes=num_classes, parts=parts, list_images=_list_loaded, options=options, rule=rule)


def _list_loaded(dataset: Any) -> Labelled:
    return Labelled(list(dataset.classes), [dataset[number] for number in range(len(dataset))])


def _list_pets(dataset: Any) -> Labelled:
    return Labelled(list(dataset.classes), list(zip(map(str, dataset._images), dataset._labels, strict=True)))


def _list_gtsrb(dataset: Any) -> Labelled:
    """The folder of a training image is named by its class, which torchvision takes by its rank among the folders."""
    found = []
    for path, label in dataset._samples:
        name = Path(path).parent.name
        found.append((path, int(name) if name.isdecimal() else label))
    return Labelled([], found)


def _list_caltech(dataset: Any) -> Labelled:
    folder = Path(dataset.root) / "101_ObjectCategories"
    found = []
    for number, label in zip(dataset.index, dataset.y, strict=True):
        found.append((str(folder / dataset.categories[label] / f"image_{number:04d}.jpg"), label))
    return Labelled(dataset.categories, found)


# --- files ----------------------------------------------------------------------------------------------------------


def _parts(*splits: str, needs: Sequence[str], of: Mapping[str, Sequence[str]] | None = None) -> dict[str, Part]:
    """Of a class that takes ``split``. ``needs`` may hold its name as ``{}``; ``of`` has what one split alone needs."""
    paths = {split: (*needs, *(of or {}).get(split, ())) for split in splits}
    return {
        split: Part(needs=tuple(path.format(split) for path in paths[split]), options={"split": split})
        for split in splits
    }


def _no_split(*needs: str) -> dict[str, Part]:
    return {split: Part(needs=needs) for split in ("train", "test")}


def _cifar_parts(cls: type[CIFAR10]) -> dict[str, Part]:
    """torchvision unpickles these files, which could run any code, so it gets to see them with right checksums only."""
    files = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    checksums = {f"{cls.base_folder}/{name}": md5 for name, md5 in files}
    return {
        split: Part(needs=tuple(checksums), options={"train": split == "train"}, checksums=checksums)
        for split in ("train", "test")
    }


def _svhn_parts() -> dict[str, Part]:
    return {
        split: Part(needs=(name,), options={"split": split}, checksums={name: md5})
        for split, (_, name, md5) in SVHN.split_list.items()
    }


def _pcam_parts() -> dict[str, Part]:
    return {
        split: Part(needs=tuple(f"pcam/{name}" for name, *_ in files.values()), options={"split": split})
        for split, files in PCAM._FILES.items()
    }


_CIFAR = (("CIFAR10", 10, CIFAR10), ("CIFAR100", 100, CIFAR100))
_SIGNS = tuple(f"{number:05d}" for number in range(43))
_FLOWERS = ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat")
_AIRCRAFT = tuple(f"fgvc-aircraft-2013b/data/{name}" for name in ("variants.txt", "images_variant_{}.txt", "images"))
# torchvision leaves that folder out, and fails without it.
_CALTECH = _no_split("caltech101/101_ObjectCategories/BACKGROUND_Google")
_PETS = _parts("trainval", "test", needs=("oxford-iiit-pet/annotations/{}.txt", "oxford-iiit-pet/images"))
_CARS = _parts(
    "train",
    "test",
    needs=("stanford_cars/devkit/cars_meta.mat", "stanford_cars/cars_{}"),
    of={
        "train": ("stanford_cars/devkit/cars_train_annos.mat",),
        "test": ("stanford_cars/cars_test_annos_withlabels.mat",),
    },
)
_GTSRB = _parts(
    "train",
    "test",
    needs=(),
    of={"train": ("gtsrb/GTSRB/Training",), "test": ("gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv")},
)
