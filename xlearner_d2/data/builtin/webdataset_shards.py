"""Image classification: tar shards as the webdataset project writes them, of which images are read in any order.

Each shard is indexed once: where its images are, and their labels. webdataset's own readers are not used because they
give images in the order of the file, and the order in which a run sees them is decided by seed and step alone.
"""

import functools
import glob
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm  # type: ignore[import-untyped]
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from ...specs import DatasetSpec
from ..files import tar_member_path
from ..problems import Problems
from .common import Records, add_to_catalogs, fail, hint, raise_if_any, subject
from .label_names import LabelIndex, find_classes
from .torchvision_files import CACHE

logger = logging.getLogger(__name__)

_LABEL_KEY = "cls"
_IMAGE_KEYS = {suffix.removeprefix(".") for suffix in IMG_EXTENSIONS}
_VERSION = 1


class Sample(NamedTuple):
    """An image of a shard: its key, suffix, first byte and number of bytes, and its label as it is written."""

    key: str
    suffix: str
    offset: int
    size: int
    label: str


def register(spec: DatasetSpec, root: Path) -> None:
    """Register a data set of format ``webdataset``. Shards are indexed here, or their index is read.

    The index of a shard is kept in ``xlearner_cache`` beside it, where that can be written.

    Raises:
        ConfigError: for missing or damaged shards, images without a label, repeated keys, or unknown labels.
    """
    shards = _find_shards(spec, root)
    hidden = True if os.environ.get("CI") else None  # None: hidden unless on a terminal
    title = f"Indexing the shards of {spec.name}"
    progress = tqdm(shards, desc=title, delay=5, disable=hidden, leave=False)
    samples = [(shard, sample) for shard in progress for sample in _read_index(spec, shard)]
    if not samples:
        raise fail(spec, f"SHARDS: {spec.shards} hold no image with its label (such as 0001.jpg and 0001.cls).")
    _check_keys(spec, samples)
    classes = find_classes(spec, root, (sample.label for _, sample in samples))
    labels = _indices(spec, samples, classes)
    add_to_catalogs(
        spec.name,
        functools.partial(_records, samples, labels),
        classes=classes,
        image_root=str(shards[0].parent),
        evaluator_type="classification",
    )


def _records(samples: Sequence[tuple[Path, Sample]], labels: Sequence[int]) -> Records:
    """One record per image, as of an image folder; ``file_name`` is a path that Detectron2's PathManager opens."""
    records = []
    for (shard, sample), label in zip(samples, labels, strict=True):
        name = f"{sample.key}.{sample.suffix}"
        file = tar_member_path(shard, offset=sample.offset, size=sample.size, name=name)
        records.append({"file_name": file, "image_id": sample.key, "category_id": label})
    return records


def _find_shards(spec: DatasetSpec, root: Path) -> list[Path]:
    found: list[Path] = []
    problems = Problems(subject(spec))
    for pattern in expand_urls(spec.shards) if spec.shards else []:
        path = root / pattern
        matching = [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(pattern) else [path]
        for shard in matching:
            if not shard.is_file():
                problems.add("missing shards", f"SHARDS: there is no file {shard}. {hint(shard)}")
        if not matching:
            problems.add("missing shards", f"SHARDS: no file is named like {path}. {hint(path)}")
        found += matching
    raise_if_any(problems)
    if not found:
        raise fail(spec, f"SHARDS is {spec.shards!r}, but the path of a tar file is expected.")
    return found


def _read_index(spec: DatasetSpec, shard: Path) -> list[Sample]:
    """The images of a shard, from its index if that is of this very file."""
    status = shard.stat()
    stamp = [_VERSION, status.st_size, status.st_mtime_ns]
    file = shard.parent / CACHE / "webdataset" / f"{shard.name}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return [Sample(*sample) for sample in known["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or a damaged one, which is made again
    samples = _index(spec, shard)
    try:
        _write(file, json.dumps({"stamp": stamp, "samples": samples}))
    except OSError as error:
        logger.info("%s: the index of %s is not kept, as it cannot be written: %s.", subject(spec), shard, error)
    return samples


def _write(file: Path, text: str) -> None:
    """The file appears complete or not at all, as several processes may write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
        stream.write(text)
    os.replace(stream.name, file)


def _index(spec: DatasetSpec, shard: Path) -> list[Sample]:
    """Read all headers of a tar file, and the labels."""
    problems = Problems(subject(spec))
    samples = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in _groups(tar):
                text = _fault(members)
                if text:
                    problems.add("incomplete samples", f"{shard}: {key!r} {text}.")
                    continue
                suffix, image = next((s, m) for s, m in members.items() if s.lower() in _IMAGE_KEYS)
                stream = tar.extractfile(members[_LABEL_KEY])
                assert stream is not None  # a file, as _groups gives no others
                label = stream.read().decode("utf-8").strip()
                samples.append(Sample(key, suffix, image.offset_data, image.size, label))
    except (tarfile.TarError, EOFError, UnicodeDecodeError, OSError) as error:
        raise fail(spec, f"{shard} cannot be read as an uncompressed tar file: {error}. {_advice(shard)}") from error
    raise_if_any(problems)
    return samples


def _advice(shard: Path) -> str:
    if shard.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
        return "Images cannot be read from the middle of a compressed file: uncompress it."
    return "Is it complete?"


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members, by suffix, of each sample: files in a row with the same name up to the first dot."""
    last, members = None, dict[str, tarfile.TarInfo]()
    for member in tar:
        key, suffix = base_plus_ext(member.name)
        if not member.isfile() or key is None or Path(key).name.startswith("__"):
            continue  # folders, and webdataset's own notes
        if key != last and members:
            yield last or "", members
            members = {}
        last = key
        members[suffix] = member
    if members:
        yield last or "", members


def _fault(members: dict[str, tarfile.TarInfo]) -> str:
    images = [suffix for suffix in members if suffix.lower() in _IMAGE_KEYS]
    if len(images) == 1 and _LABEL_KEY in members:
        return ""
    return (
        f"has the members {', '.join(members)}, but one image, such as jpg, and its label, {_LABEL_KEY}, are expected"
    )


def _check_keys(spec: DatasetSpec, samples: Sequence[tuple[Path, Sample]]) -> None:
    problems, seen = Problems(subject(spec)), dict[str, Path]()
    for shard, sample in samples:
        if sample.key in seen:
            text = f"{shard}: the key {sample.key!r} is in {seen[sample.key]} already, but keys should be unique."
            problems.add("repeated keys", text)
        seen.setdefault(sample.key, shard)
    raise_if_any(problems)


def _indices(spec: DatasetSpec, samples: Sequence[tuple[Path, Sample]], classes: Sequence[str]) -> list[int]:
    index_of = LabelIndex(classes)
    problems, found = Problems(subject(spec)), []
    for shard, sample in samples:
        index = index_of[sample.label]
        if index is None:
            wish = index_of.expected(sample.label)
            text = f"{shard}: {sample.key!r} has the label {sample.label!r}, but {wish}"
            problems.add("labels of unknown classes", text)
        else:
            found.append(index)
    raise_if_any(problems)
    return found
