"""Pascal VOC: one XML file of boxes per image.

The records equal those of Detectron2's ``load_voc_instances``, which is not used because it fails for a split of one
image and for PNG images, and reports malformed files and unknown classes without naming the file.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...specs import DatasetSpec, nearest
from ..problems import Problems
from .common import (
    Records,
    add_to_catalogs,
    fail,
    find_folder,
    list_images,
    raise_if_any,
    read_classes,
    read_text,
    subject,
)

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``voc``.

    The classes are, in this order of preference, ``CLASSES``, ``labels.txt`` in the root, or all names of objects in
    ``Annotations`` (of every split, so that the splits agree), sorted.

    Raises:
        ConfigError: for a wrong layout, year or list of classes.
    """
    folder = find_folder(spec, "ROOT", root / spec.root)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        find_folder(spec, "ROOT", folder / name)
    if spec.year not in (2007, 2012):
        raise fail(spec, f"YEAR is {spec.year}, but 2007 or 2012 is expected.")
    _read_split(spec, folder)
    classes = read_classes(spec, root, default=folder / "labels.txt") or _collect_classes(spec, folder)
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, folder, classes),
        thing_classes=classes,
        dirname=str(folder),
        year=spec.year,
        split=spec.split,
        evaluator_type="pascal_voc",
    )


def _read_split(spec: DatasetSpec, folder: Path) -> list[str]:
    """Names of the split's images, without suffix."""
    path = folder / "ImageSets" / "Main" / f"{spec.split}.txt"
    if not path.is_file():
        known = [file.stem for file in path.parent.glob("*.txt")]
        raise fail(spec, f"SPLIT: there is no file {path}.{nearest(spec.split, known)}")
    text = read_text(spec, "SPLIT", path)
    if not text.strip():
        raise fail(spec, f"{path} is empty, but one image name a line is expected.")
    problems = Problems(subject(spec))
    names = text.removesuffix("\n").split("\n")
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if len(name.split()) != 1:
            # Detectron2's evaluator takes every line as a name, so an empty one would fail after training.
            expected = "one image name without suffix is expected"
            problems.add("malformed lines", f"{path}, line {number}: got {name.strip()!r}, but {expected}.")
        elif name.strip() in seen:
            problems.add("repeated images", f"{path}, line {number}: {name.strip()!r} is listed twice.")
        seen.add(name.strip())
    raise_if_any(problems)
    return [name.strip() for name in names]


def _parse(file: Path, problems: Problems) -> ElementTree.Element | None:
    """The root of an XML file, or None and one more problem."""
    if not file.is_file():
        problems.add("missing annotations", f"there is no annotation {file}.")
        return None
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        problems.add("malformed annotations", f"{file} is not valid XML: {error}.")
    except (OSError, ValueError, LookupError) as error:  # for example an unknown encoding
        problems.add("unreadable annotations", f"{file} cannot be read: {error}.")
    return None


def _collect_classes(spec: DatasetSpec, folder: Path) -> list[str]:
    problems = Problems(subject(spec))
    names: set[str] = set()
    for file in sorted((folder / "Annotations").glob("*.xml")):
        tree = _parse(file, problems)
        if tree is not None:
            names |= {name for item in tree.findall("object") if (name := item.findtext("name"))}
    raise_if_any(problems)
    if not names:
        text = f"{folder / 'Annotations'} has no XML file with a named object, so there are no classes; give CLASSES."
        raise fail(spec, text)
    return sorted(names)


def _read(spec: DatasetSpec, folder: Path, classes: Sequence[str]) -> Records:
    """Detectron2 records of the split.

    Raises:
        ConfigError: with the problems of all annotation files.
    """
    problems = Problems(subject(spec))
    try:
        images = list_images(folder / "JPEGImages")
    except ValueError as error:
        raise fail(spec, str(error)) from error
    records = []
    for name in _read_split(spec, folder):
        file = folder / "Annotations" / f"{name}.xml"
        tree = _parse(file, problems)
        if tree is None:
            continue
        # A missing image gets the usual suffix; that it is missing is for the check of all files to say.
        image = images.get(name, folder / "JPEGImages" / f"{name}.jpg")
        record = {"file_name": str(image), "image_id": name, **_size(file, tree, problems)}
        records.append({**record, "annotations": _objects(file, tree, classes, problems)})
    raise_if_any(problems)
    return records


def _size(file: Path, tree: ElementTree.Element, problems: Problems) -> dict[str, int]:
    """Height and width in pixels."""
    size = {}
    for key in ("height", "width"):
        text = (tree.findtext(f"size/{key}") or "").strip()
        if not text.isdecimal() or int(text) < 1:
            expected = "a positive whole number of pixels is expected"
            problems.add("wrong image sizes", f"{file}: size/{key} is {text!r}, but {expected}.")
        else:
            size[key] = int(text)
    return size


def _objects(file: Path, tree: ElementTree.Element, classes: Sequence[str], problems: Problems) -> Records:
    objects = []
    for number, item in enumerate(tree.findall("object"), 1):
        name = item.findtext("name")
        if name not in classes:
            suggestion = nearest(name or "", classes)
            text = f"{file}: object {number} is {name!r}, which is not among the {len(classes)} classes.{suggestion}"
            problems.add("objects of unknown classes", text)
            continue
        corners = [_number(item.findtext(f"bndbox/{key}")) for key in _CORNERS]
        if not all(map(math.isfinite, corners)):
            got = {key: item.findtext(f"bndbox/{key}") for key in _CORNERS}
            text = f"{file}: object {number} ({name}) has the bndbox {got}, but four numbers are expected."
            problems.add("malformed boxes", text)
            continue
        # Corners are 1-based and inclusive, so the first pixel alone is xmin = xmax = 1 and becomes [0, 1].
        box = [corners[0] - 1.0, corners[1] - 1.0, corners[2], corners[3]]
        objects.append({"category_id": classes.index(name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS})
    return objects


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
