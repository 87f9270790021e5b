"""Semantic segmentation: a folder of images and one of label PNGs with the same names.

The records equal those of Detectron2's ``load_sem_seg``, which is not used because it takes images of one suffix alone
and pairs images and labels by position, so that equally many of either with different names are mixed up.
"""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from ...specs import DatasetSpec
from ..files import label_path
from ..problems import Problems
from .common import (
    Records,
    add_to_catalogs,
    fail,
    find_folder,
    raise_if_any,
    read_classes,
    read_text,
    subject,
    walk_images,
    warn_unlabelled,
)

#: Bit depth and colour type in the header of a PNG that holds one 8-bit channel, and where they are.
_PLAIN, _PLAIN_AT = b"\x08\x00", slice(24, 26)
_PORTION = 64


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``sem_seg``.

    Raises:
        ConfigError: for a missing folder, or a wrong list of classes or images, or a wrong ignored value.
    """
    images = find_folder(spec, "IMAGES", root / spec.images)
    labels = find_folder(spec, "LABELS", root / spec.labels)
    classes = read_classes(spec, root)
    if not classes:
        raise fail(spec, "CLASSES is empty, but the names of the label values 0, 1, … are expected.")
    if not 0 <= spec.ignore_value <= 255:
        raise fail(spec, f"IGNORE_VALUE is {spec.ignore_value}, but a label value from 0 to 255 is expected.")
    listed = _read_list(spec, root / spec.list) if spec.list else None
    add_to_catalogs(
        spec.name,
        functools.partial(_read, spec, images, labels, listed),
        stuff_classes=classes,
        ignore_label=spec.ignore_value,
        image_root=str(images),
        sem_seg_root=str(labels),
        evaluator_type="sem_seg",
    )


def _read_list(spec: DatasetSpec, path: Path) -> list[tuple[str, str]]:
    """Of each line, the names of an image and of its label, as they are written.

    A line may give the image alone; the label then has the same name.
    """
    problems = Problems(subject(spec))
    found: dict[str, int] = {}
    pairs = []
    for number, line in enumerate(read_text(spec, "LIST", path).splitlines(), 1):
        words = line.split()
        if len(words) > 2:
            text = f"{path}, line {number}: got {line.strip()!r}, but one image, or it and its label, is expected."
            problems.add("malformed lines", text)
        elif words:
            name = _key(words[0], spec.image_suffix)
            if name in found:
                text = f"{path}, line {number}: {name!r} is in line {found[name]} already."
                problems.add("repeated images", text)
            found[name] = number
            pairs.append((words[0], words[-1]))
    raise_if_any(problems)
    if not pairs:
        raise fail(spec, f"LIST: {path} is empty, but one image name a line is expected.")
    return pairs


def _key(name: str, suffix: str) -> str:
    """What images and labels are paired by: a path without the suffix of its format, and without ``suffix``."""
    return _without_format(name).removesuffix(_without_format(suffix))


def _without_format(name: str) -> str:
    """``_gtFine_labelTrainIds`` for itself and for ``_gtFine_labelTrainIds.png``."""
    stem, dot, ending = name.rpartition(".")  # not pathlib, which would take longer than reading the files
    return stem if f"{dot}{ending}".lower() in IMG_EXTENSIONS else name


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _find(spec: DatasetSpec, folder: Path, *, suffix: str, key: str, formats: Sequence[str]) -> dict[str, str]:
    """Files below a folder, by what they are paired by.

    Raises:
        ConfigError: if there is none, or if two differ in the suffix of their format alone.
    """
    found: dict[str, str] = {}
    problems = Problems(subject(spec))
    ending = _without_format(suffix)
    only = suffix[len(ending) :].lower()  # its format, such as .jpg beside labels in the same folder
    for path in walk_images(folder, (only,) if only in formats else formats):
        if not _without_format(path).endswith(ending):
            continue
        name = _key(path, suffix)
        if name in found:
            text = f"{folder}/{path} and {_last(found[name])} differ in their suffix alone, but one is expected."
            problems.add("ambiguous names", text)
        found[name] = f"{folder}/{path}"
    raise_if_any(problems)
    if not found:
        ending = f" whose name ends in {suffix!r} ({key})" if suffix else ""
        kind = "label PNG" if formats == (".png",) else "image"
        raise fail(spec, f"{folder} holds no {kind}{ending}, but files in it or in folders below it are expected.")
    return found


def _read(
    spec: DatasetSpec, image_folder: Path, label_folder: Path, listed: Sequence[tuple[str, str]] | None
) -> Records:
    """Detectron2 records of the images that are ``listed``, or else of all that have a label.

    Without a list, an image without a label is left out with a warning, as Detectron2 does, because only a part of a
    data set may be labelled. A label without an image can only be a mistake.

    Raises:
        ConfigError: if there are no pairs, labels without an image, or listed images or labels are not there.
    """
    images = _find(spec, image_folder, suffix=spec.image_suffix, key="IMAGE_SUFFIX", formats=IMG_EXTENSIONS)
    labels = _find(spec, label_folder, suffix=spec.label_suffix, key="LABEL_SUFFIX", formats=(".png",))
    if listed is None:
        _check_labels(spec, image_folder, images, labels)
        warn_unlabelled(spec, sorted(images.keys() - labels.keys()), len(images), label_folder)
        pairs = [(images[name], labels[name]) for name in labels]
    else:
        found_images = _choose(spec, image_folder, images, [image for image, _ in listed], spec.image_suffix, "image")
        # A line that names the image alone names its label by the same name, less the image's own suffix.
        names = [label if label != image else _key(image, spec.image_suffix) for image, label in listed]
        found_labels = _choose(spec, label_folder, labels, names, spec.label_suffix, "label PNG")
        pairs = list(zip(found_images, found_labels, strict=True))
    portions = [pairs[start : start + _PORTION] for start in range(0, len(pairs), _PORTION)]
    with ThreadPoolExecutor() as pool:  # in portions, as a future for each file would take longer than the file
        parts = pool.map(lambda part: [_readable(spec, label) for _, label in part], portions)
        readable = [label for part in parts for label in part]
    return [{"file_name": image, "sem_seg_file_name": label} for (image, _), label in zip(pairs, readable, strict=True)]


def _readable(spec: DatasetSpec, label: str) -> str:
    """A path by which Detectron2 reads class indices: the file itself if it holds nothing else."""
    if spec.reduce_zero_label:
        return label_path(label, reduce_zero_to=spec.ignore_value)
    with open(label, "rb") as stream:
        plain = stream.read(_PLAIN_AT.stop)[_PLAIN_AT] == _PLAIN
    return label if plain else label_path(label)


def _choose(
    spec: DatasetSpec, folder: Path, found: Mapping[str, str], names: Sequence[str], suffix: str, kind: str
) -> list[str]:
    """The file of each listed name: by its path below the folder, or by its end where only one file has it."""
    by_last: dict[str, list[str]] = {}
    for key in found:
        by_last.setdefault(_last(key), []).append(key)
    problems, chosen = Problems(subject(spec)), []
    taken: dict[str, str] = {}
    for name in names:
        key = _key(name, suffix)
        same = [key] if key in found else [other for other in by_last.get(_last(key), []) if _end_alike(key, other)]
        if not same:
            text = f"LIST has {name!r}, but {folder} has no {kind} of that name."
            problems.add(f"listed names without {kind}", text)
        elif len(same) > 1:
            text = (
                f"LIST has {name!r}, which may be {found[same[0]]} or {found[same[1]]}: give its path below {folder}."
            )
            problems.add("ambiguous names", text)
        elif taken.get(same[0], key) != key:
            text = f"LIST has {taken[same[0]]!r} and {key!r}, but {folder} has only {found[same[0]]} for both."
            problems.add(f"listed names with the same {kind}", text)
        taken |= dict.fromkeys(same[:1], key)
        chosen += [found[other] for other in same[:1]]
    raise_if_any(problems)
    return chosen


def _end_alike(name: str, path: str) -> bool:
    """Whether one is the end of the other: of lists, some have the folders above, and some lack those below."""
    return f"/{name}".endswith(f"/{path}") or f"/{path}".endswith(f"/{name}")


def _check_labels(spec: DatasetSpec, folder: Path, images: Mapping[str, str], labels: Mapping[str, str]) -> None:
    problems = Problems(subject(spec))
    for name in sorted(labels.keys() - images.keys()):
        text = f"{labels[name]} has no image, but one named {name} is expected in {folder}."
        cure = "If the names differ in their ends, set IMAGE_SUFFIX or LABEL_SUFFIX."
        problems.add("labels without an image", f"{text} {cure}")
    raise_if_any(problems)
