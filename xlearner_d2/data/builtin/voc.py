"""Pascal VOC: one XML file of boxes per image, in the folders of the devkit or beside its image.

The records equal those of Detectron2's ``load_voc_instances``, which is not used because it fails for a split of one
image and for PNG images, and reports malformed files and unknown classes without naming the file.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from ...specs import DatasetSpec, nearest
from ..problems import Problems
from .common import (
    Records,
    add_to_catalogs,
    check_similar,
    fail,
    find_folder,
    list_images,
    raise_if_any,
    read_classes,
    read_text,
    subject,
)

logger = logging.getLogger(__name__)

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_EVALUATORS = {"voc": "pascal_voc", "coco": "coco"}


@dataclass(frozen=True)
class Layout:
    """Where things are.

    Attributes:
        folder: holds the devkit's folders, or else those of images beside their XML files; ``labels.txt`` is here.
        images, annotations: folders of this split's images and XML files.
        names: of the split's images, without suffix.
        all_annotations: folders of the XML files of all splits.
    """

    folder: Path
    images: Path
    annotations: Path
    names: Sequence[str]
    all_annotations: Sequence[Path]


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``voc``.

    The classes are, in this order of preference, ``CLASSES``, ``labels.txt`` in the root, or all names of objects in
    the annotations (of every split, so that the splits agree), sorted.

    Raises:
        ConfigError: for a wrong layout, year, evaluation or list of classes.
    """
    if spec.year not in (2007, 2012):
        raise fail(spec, f"YEAR is {spec.year}, but 2007 or 2012 is expected.")
    if spec.evaluation not in _EVALUATORS:
        text = f"EVALUATION is {spec.evaluation!r}, but {' or '.join(_EVALUATORS)} is expected."
        raise fail(spec, text + nearest(spec.evaluation, _EVALUATORS))
    layout = _find_layout(spec, find_folder(spec, "ROOT", root / spec.root))
    classes = read_classes(spec, root, default=layout.folder / "labels.txt") or _collect_classes(spec, layout)
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, layout, classes),
        thing_classes=classes,
        dirname=str(layout.folder),
        annotation_dir=str(layout.annotations),
        year=spec.year,
        split=spec.split,
        evaluator_type=_EVALUATORS[spec.evaluation],
    )


def _find_layout(spec: DatasetSpec, folder: Path) -> Layout:
    """The devkit's folders, in ``folder`` or, as it unpacks, in VOC2007 and VOC2012 below it; else flat ones."""
    year = f"VOC{spec.year}"
    devkits = [folder, folder / year, folder / "VOCdevkit" / year]
    for devkit in devkits:
        if (devkit / "Annotations").is_dir():
            return _devkit(spec, devkit)
    others = [path for path in (folder, folder / "VOCdevkit") if any(path.glob("VOC20*/Annotations"))]
    if others:
        years = ", ".join(sorted(path.parent.name for path in others[0].glob("VOC20*/Annotations")))
        raise fail(spec, f"ROOT: {others[0]} holds {years}, but not {year} (YEAR is {spec.year}).")
    return _flat(spec, folder)


def _devkit(spec: DatasetSpec, folder: Path) -> Layout:
    images, annotations = find_folder(spec, "ROOT", folder / "JPEGImages"), folder / "Annotations"
    if spec.split:
        find_folder(spec, "ROOT", folder / "ImageSets/Main")
        names = _read_split(spec, folder)
    else:
        names = _xml_names(spec, annotations)
    return Layout(folder, images, annotations, names, [annotations])


def _flat(spec: DatasetSpec, folder: Path) -> Layout:
    """Images beside their XML files: in ``folder``, or in one folder for each split."""
    if not spec.split:
        return Layout(folder, folder, folder, _xml_names(spec, folder), [folder])
    part = folder / spec.split
    if not part.is_dir():
        known = [path.name for path in folder.iterdir() if path.is_dir()]
        text = f"{folder} has neither a folder Annotations (of the VOC devkit) nor a folder {spec.split} (SPLIT)."
        raise fail(spec, f"ROOT: {text}{nearest(spec.split, known)}")
    parts = sorted({path.parent for path in folder.glob("*/*.xml")})
    return Layout(folder, part, part, _xml_names(spec, part), parts)


def _xml_names(spec: DatasetSpec, folder: Path) -> list[str]:
    names = sorted(path.stem for path in folder.glob("*.xml"))
    if not names:
        text = "but Annotations and JPEGImages, or images beside their XML files, are expected"
        raise fail(spec, f"ROOT: {folder} has no XML file, {text}. Splits in folders of their own need SPLIT.")
    return names


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


def _collect_classes(spec: DatasetSpec, layout: Layout) -> list[str]:
    problems = Problems(subject(spec))
    names: set[str] = set()
    for file in sorted(path for folder in layout.all_annotations for path in folder.glob("*.xml")):
        tree = _parse(file, problems)
        if tree is not None:
            names |= {name for item in tree.findall("object") if (name := item.findtext("name"))}
    raise_if_any(problems)
    if not names:
        text = f"{layout.annotations} has no XML file with a named object, so there are no classes; give CLASSES."
        raise fail(spec, text)
    check_similar(spec, names)
    return sorted(names)


def _read(spec: DatasetSpec, layout: Layout, classes: Sequence[str]) -> Records:
    """Detectron2 records of the split.

    For COCO's evaluation images are numbered, as it needs, and difficult objects are crowds: they are not learnt, and
    finding them is neither right nor wrong.

    Raises:
        ConfigError: with the problems of all annotation files.
    """
    problems = Problems(subject(spec))
    try:
        images = list_images(layout.images)
    except ValueError as error:
        raise fail(spec, str(error)) from error
    if layout.images == layout.annotations:
        _warn_unlabelled(spec, sorted(images.keys() - set(layout.names)), len(images), layout.images)
    indices = {name: index for index, name in enumerate(classes)}
    as_coco = spec.evaluation == "coco"
    records = []
    for number, name in enumerate(layout.names, 1):
        file = layout.annotations / f"{name}.xml"
        tree = _parse(file, problems)
        if tree is None:
            continue
        # A missing image gets the usual suffix; that it is missing is for the check of all files to say.
        image = images.get(name, layout.images / f"{name}.jpg")
        size = _size(file, tree, problems)
        objects = _objects(file, tree, indices, problems, difficult_is_crowd=as_coco)
        image_id = number if as_coco else name
        records.append({"file_name": str(image), "image_id": image_id, **size, "annotations": objects})
    raise_if_any(problems)
    _warn_counted_from_0(spec, records)
    return records


def _warn_counted_from_0(spec: DatasetSpec, records: Records) -> None:
    corners = [it["bbox"][:2] for record in records for it in record["annotations"]]
    early = sum(min(corner) < 0 for corner in corners)
    if early:
        text = "%s: %d of %d boxes begin before pixel 1, which is VOC's first. %s"
        shift = "If the files count from 0, all boxes are one pixel too far left and up: add 1 to all corners."
        logger.warning(text, subject(spec), early, len(corners), shift)


def _warn_unlabelled(spec: DatasetSpec, names: Sequence[str], num_images: int, folder: Path) -> None:
    if names:
        few = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        text = "%s: %d of %d images in %s have no XML file beside them and are left out: %s"
        logger.warning(text, subject(spec), len(names), num_images, folder, few)


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


def _objects(
    file: Path,
    tree: ElementTree.Element,
    classes: Mapping[str, int],
    problems: Problems,
    *,
    difficult_is_crowd: bool,
) -> Records:
    objects = []
    for number, item in enumerate(tree.findall("object"), 1):
        name = item.findtext("name")
        if name is None or name not in classes:
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
        found: dict[str, Any] = {"category_id": classes[name], "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
        if difficult_is_crowd:
            found["iscrowd"] = int((item.findtext("difficult") or "0").strip() == "1")
        objects.append(found)
    return objects


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
