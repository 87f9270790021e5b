"""Is a data set what its records say? Everything wrong is collected, so that nothing fails hours into training."""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from .check_pixels import (
    DECODE_ERRORS,
    check_depth,
    check_label,
    check_masks,
    check_segments,
    tell_far,
    tell_unlabelled,
    tell_unseen,
    words,
)
from .files import orientation, shown
from .problems import Problems

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Finding = tuple[str, str]  # kind and text of a problem
Item = TypeVar("Item")
Result = TypeVar("Result")

#: Class names in the metadata: of boxes, of semantic labels, of images.
CLASS_KEYS = ("thing_classes", "stuff_classes", "classes")
#: Degenerate boxes that are left to Detectron2's mapper, which drops them, per box of a data set. COCO has a few.
TOLERATED_BOXES = 1e-4
#: How far a box may exceed its image, in pixels: annotation tools round, and count pixels from 0 or from 1.
BOX_MARGIN = 1.0

_BOX_KIND = "boxes that are empty or outside their image"
_FILE_KEYS = ("file_name", "sem_seg_file_name", "pan_seg_file_name", "depth_file_name")
_PORTION = 32
_EXIF_TRANSPOSED, _EXIF_MIRRORED = (5, 6, 7, 8), (2, 3, 4)
_TURNED_KIND = "images that are turned"


def check_records(name: str, records: Sequence[Record], metadata: Metadata, *, max_images: int) -> list[str]:
    """Problems of a data set's records and of the files that they name.

    All files must exist, and all image ids, class indices and boxes must be valid. Images and label PNGs are decoded
    as well, ``max_images`` of each, to find damaged files, wrong sizes and wrong labels.

    Args:
        name: the data set's name, for messages.
        records: in Detectron2's format.
        metadata: the data set's metadata, which has the names of its classes.
        max_images: how many records' files are decoded, evenly spaced; -1 for all.

    Returns:
        one line per problem, at most a handful of each kind; empty if all is well.
    """
    problems = Problems(f"data set {name!r}")
    _check_file_names(records, problems)
    if problems:
        return problems.lines()
    _check_image_ids(records, problems)
    _check_repeated_files(records, problems)
    _check_categories(records, metadata, problems)
    _check_boxes(records, problems)
    missing = _check_files(name, records, problems)
    present = [record for record in _spread(records, max_images) if missing.isdisjoint(_files(record))]
    for findings in _run(lambda record: _decode(record, metadata), present, f"Decoding images of {name}"):
        for kind, text in findings:
            problems.add(kind, text)
    _tell_turned(problems, len(present))
    tell_far(problems, len(present))
    tell_unlabelled(problems, len(present))
    tell_unseen(problems, metadata)
    return problems.lines()


def check_same_classes(names: Sequence[str]) -> list[str]:
    """Problems if the data sets of one source differ in their classes or the order of them.

    Args:
        names: registered data sets; those of Detectron2 must have been loaded, which sets their class names.
    """
    problems = []
    for first, other in ((names[0], name) for name in dict.fromkeys(names[1:])):
        for key in CLASS_KEYS:
            expected = MetadataCatalog.get(first).get(key, None)
            got = MetadataCatalog.get(other).get(key, None)
            if expected != got:
                text = class_difference(expected, got)
                problems.append(f"data sets {first!r} and {other!r} should have the same {key}, but {text}.")
    return problems


def class_difference(
    expected: Sequence[str] | None, got: Sequence[str] | None, owners: tuple[str, str] = ("first", "second")
) -> str:
    """In words: how the class lists that one and another have differ."""
    one, other = owners
    if expected is None or got is None:
        return f"only the {other if expected is None else one} has any"
    counts = f"the {one} has {len(expected)} and the {other} {len(got)}"
    for index, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return f"class {index} is {a!r} in the {one} and {b!r} in the {other} ({counts})"
    longer, extra = (one, expected[len(got) :]) if len(expected) > len(got) else (other, got[len(expected) :])
    return f"{counts}; only the {longer} has {', '.join(map(repr, extra[:5]))}{', …' if len(extra) > 5 else ''}"


def _check_file_names(records: Sequence[Record], problems: Problems) -> None:
    if not records:
        problems.add("empty data sets", "there are no images, but at least one is expected.")
    for number, record in enumerate(records):
        if not record.get("file_name"):
            text = f"record {number} lacks a 'file_name', but the path of an image is expected."
            problems.add("nameless images", text)


def _check_image_ids(records: Sequence[Record], problems: Problems) -> None:
    counts = Counter(record["image_id"] for record in records if "image_id" in record)
    for key, count in counts.items():
        if count > 1:
            problems.add("repeated image ids", f"image_id {key!r} occurs {count} times, but once is expected.")


def _check_repeated_files(records: Sequence[Record], problems: Problems) -> None:
    """An image that is listed twice has two answers, each of which is an error for the other."""
    for file, count in Counter(str(record["file_name"]) for record in records).items():
        if count > 1:
            problems.add("repeated images", f"{file} is the image of {count} records, but of one is expected.")


def _check_categories(records: Sequence[Record], metadata: Metadata, problems: Problems) -> None:
    """Class indices of images (``classes``), of objects (``thing_classes``) and of panoptic segments."""
    things, classes = metadata.get("thing_classes", None), metadata.get("classes", None)
    for record in records:
        found = [(item.get("category_id"), things) for item in record.get("annotations", ())]
        found += [(item.get("category_id"), _segment_names(item, metadata)) for item in record.get("segments_info", ())]
        found += [(category, classes) for category in record.get("category_ids", ())]
        if "category_id" in record:
            found.append((record["category_id"], classes))
        for category, names in found:
            if names is None or not isinstance(category, int | np.integer) or not 0 <= category < len(names):
                expected = f"0 to {len(names) - 1} is expected" if names else "the metadata has no class names"
                text = f"{record['file_name']} has the class index {category!r}, but {expected}."
                problems.add("wrong class indices", text)


def _segment_names(segment: Record, metadata: Metadata) -> Sequence[str] | None:
    return metadata.get("thing_classes" if segment.get("isthing") else "stuff_classes", None)


def _check_boxes(records: Sequence[Record], problems: Problems) -> None:
    """Boxes of no size, of numbers that are not finite, or outside their image; or shares of it instead of pixels."""
    total = shares = 0
    for record in records:
        for item in record.get("annotations", ()):
            if item.get("bbox_mode") not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) or "bbox" not in item:
                continue  # rotated boxes, which may leave the image
            total += 1
            shares += max(_corners(item)) <= 1
            text = _judge_box(item, record.get("height", math.inf), record.get("width", math.inf))
            if text:
                box = [round(float(value), 2) for value in item["bbox"]]
                of = "x, y, width, height" if item["bbox_mode"] == BoxMode.XYWH_ABS else "left, top, right, bottom"
                problems.add(_BOX_KIND, f"{record['file_name']}: the box {box} ({of}) {text}.")
    if total and shares == total:
        text = f"all {total} boxes are in the first pixel of their image: pixels are expected, not shares of its size."
        problems.add("boxes that are shares", text)
    if 0 < problems.count(_BOX_KIND) <= TOLERATED_BOXES * total:
        few = problems.pop(_BOX_KIND)
        logger.warning("%s: %d of %d boxes will be dropped: %s", problems.subject, len(few), total, few[0])


def _corners(item: Record) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = item["bbox"]
    return (x0, y0, x0 + x1, y0 + y1) if item["bbox_mode"] == BoxMode.XYWH_ABS else (x0, y0, x1, y1)


def _judge_box(item: Record, height: float, width: float) -> str:
    """What is wrong with an object's box, or an empty string."""
    x0, y0, x1, y1 = _corners(item)
    if not (x1 > x0 and y1 > y0):
        return f"is {x1 - x0:g} x {y1 - y0:g} pixels, but a positive width and height are expected"
    if min(x0, y0) < -BOX_MARGIN or x1 > width + BOX_MARGIN or y1 > height + BOX_MARGIN:
        return f"exceeds its image of width {width} and height {height}"
    return ""


def _files(record: Record) -> list[str]:
    return [str(record[key]) for key in _FILE_KEYS if key in record]


def _check_files(name: str, records: Sequence[Record], problems: Problems) -> set[str]:
    """The files that do not exist."""
    files = list(dict.fromkeys(file for record in records for file in _files(record)))
    found = _run(PathManager.isfile, files, f"Looking for files of {name}")
    missing = {file for file, exists in zip(files, found, strict=True) if not exists}
    for file in files:
        if file in missing:
            problems.add("missing files", f"{shown(file)} does not exist.")
    return missing


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """``count`` records, evenly spaced from the first to the last; all for -1."""
    if count < 0 or count >= len(records):
        return list(records)
    return [records[index] for index in np.linspace(0, len(records) - 1, count).round().astype(int)]


def _run(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
    """Map in threads, which suits files and Pillow; a bar shows on a terminal when it takes long."""
    # In portions, because a million futures would take longer than what they do.
    portions = [items[start : start + _PORTION] for start in range(0, len(items), _PORTION)]
    hidden = True if os.environ.get("CI") else None  # None: hidden unless on a terminal
    results: list[Result] = []
    with (
        ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
        tqdm(desc=title, total=len(items), delay=5, disable=hidden, leave=False) as bar,
    ):
        for part in pool.map(lambda portion: [function(item) for item in portion], portions):
            results += part
            bar.update(len(part))
    return results


def _decode(record: Record, metadata: Metadata) -> list[Finding]:
    """Decode a record's image and label PNG."""
    file = str(record["file_name"])
    try:
        (width, height), mode, turned = _decode_image(file)
    except DECODE_ERRORS as error:
        return [("damaged images", f"{shown(file)} cannot be decoded as an image: {words(error)}.")]
    file, findings = shown(file), []
    if mode.startswith(("I", "F")):  # which Pillow turns into RGB by cutting off what is above 255
        text = f"{file} has the mode {mode}, but 8 bits a channel are expected, as all above 255 would become white."
        findings.append(("images of more than 8 bits", text))
    expected = (record.get("width", width), record.get("height", height))
    if expected != (width, height):
        text = f"{file} is {width} x {height} pixels, but its annotation says {expected[0]} x {expected[1]}."
        if expected == (height, width) and turned in _EXIF_TRANSPOSED:
            text += " An EXIF tag turns it by a right angle: are its boxes and labels those of the picture as stored?"
        findings.append(("wrong image sizes", text))
    placed = record.get("annotations") or any(key in record for key in _FILE_KEYS[1:])
    if placed and turned in (_EXIF_MIRRORED if width != height else _EXIF_MIRRORED + _EXIF_TRANSPOSED):
        findings.append((_TURNED_KIND, file))  # which its size does not tell
    findings += check_masks(record, (width, height))
    if "sem_seg_file_name" in record:
        findings += check_label(str(record["sem_seg_file_name"]), (width, height), metadata)
    if "pan_seg_file_name" in record:
        findings += check_segments(record, (width, height))
    if "depth_file_name" in record:
        findings += check_depth(record, (width, height))
    return findings


def _tell_turned(problems: Problems, decoded: int) -> None:
    """Nothing shows whether boxes and labels are those of the picture as it is stored or as it is seen."""
    if found := problems.pop(_TURNED_KIND):
        what = "%s: an EXIF tag turns or mirrors %d of the %d images that were decoded, such as %s"
        text = f"{what}. They are read as one sees them: boxes and labels have to be so, too."
        logger.warning(text, problems.subject, len(found), decoded, found[0])


def _decode_image(file: str) -> tuple[tuple[int, int], str, int]:
    """Width and height as Detectron2 reads the image, which turns it as its EXIF tag says; Pillow's mode; that tag."""
    with PathManager.open(file, "rb") as stream, Image.open(stream) as image:
        (width, height), mode = image.size, image.mode
        turned = orientation(image)
        # JPEG decodes at an eighth of the size several times faster, and still notices what is missing.
        image.draft(image.mode, (1, 1))
        image.load()
    return (height, width) if turned in _EXIF_TRANSPOSED else (width, height), mode, turned
