"""Files inside other files, and label images that need a change when they are read, as paths of Detectron2.

Detectron2's ``PathManager`` opens such a path as it opens a file. So do all that read through it: the mappers of
Detectron2 and of projects built on it, its evaluators and its visualizer.
"""

import io
import os
import re
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import ExifTags, Image

_TAR, _LABEL = "tar-member://", "label://"
_TAR_PATH = re.compile(rf"{_TAR}(?P<tar>.*?)#(?P<offset>\d+)\+(?P<size>\d+)#(?P<name>.*)", re.DOTALL)
_LABEL_PATH = re.compile(rf"{_LABEL}(?:reduce-zero-to-(?P<ignored>\d+))?@(?P<file>.*)", re.DOTALL)
#: Modes of Pillow whose pixels are indices; "I;16" and "I" are 16-bit PNGs, "1" is black and white.
_INDEX_MODES = ("L", "P", "1", "I;16", "I")
_MAX_LABEL = 255
#: Grey PNGs of 2 and 4 bits, as Pillow names them, and what it multiplies their values by.
_SCALED = {"L;2": 85, "L;4": 17}


def orientation(image: Image.Image) -> int:
    """The EXIF tag that says how an image is turned; 1, as it is stored, where its EXIF cannot be read.

    Detectron2's reader takes such an image as it is, too.
    """
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow has many kinds for blocks that are no EXIF
        return 1


def tar_member_path(tar: str | os.PathLike[str], *, offset: int, size: int, name: str) -> str:
    """The path of ``size`` bytes from ``offset`` on in a tar file; ``name`` is for messages."""
    return f"{_TAR}{tar}#{offset}+{size}#{name}"


def label_path(file: str | os.PathLike[str], *, reduce_zero_to: int | None = None) -> str:
    """The path of a label image as one 8-bit channel of class indices, whatever its palette or depth.

    Args:
        file: an image of one channel, or with a palette, whose indices are then the labels.
        reduce_zero_to: label 0 becomes this one, which stays as it is, and every other label k becomes k - 1.
    """
    return f"{_LABEL}{'' if reduce_zero_to is None else f'reduce-zero-to-{reduce_zero_to}'}@{file}"


def shown(path: str) -> str:
    """A path as messages have it: that of the file on disk which holds it."""
    if found := _TAR_PATH.fullmatch(path):
        return f"{found['name']} in {found['tar']}"
    found = _LABEL_PATH.fullmatch(path)
    return found["file"] if found else path


class _Member(NamedTuple):
    tar: str
    offset: int
    size: int


class _VirtualFiles(PathHandler):
    """What files that can only be read have in common."""

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path, **kwargs)

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return False

    def _check_mode(self, path: str, mode: str) -> None:
        if mode != "rb":
            raise ValueError(f"{path} can only be opened with the mode 'rb', not {mode!r}.")


class TarMembers(_VirtualFiles):
    """Paths of :func:`tar_member_path`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_TAR]

    def _parse(self, path: str) -> _Member:
        found = _TAR_PATH.fullmatch(path)
        if found is None:
            raise ValueError(f"{path} is not of the form {_TAR}FILE#OFFSET+SIZE#NAME.")
        return _Member(found["tar"], int(found["offset"]), int(found["size"]))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        member = self._parse(path)
        try:
            return os.stat(member.tar).st_size >= member.offset + member.size
        except OSError:
            return False

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        self._check_mode(path, mode)
        member = self._parse(path)
        with open(member.tar, "rb") as stream:
            stream.seek(member.offset)
            return io.BytesIO(stream.read(member.size))


class Labels(_VirtualFiles):
    """Paths of :func:`label_path`; read as PGM, which costs a copy and no compression."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_LABEL]

    def _parse(self, path: str) -> tuple[str, int | None]:
        found = _LABEL_PATH.fullmatch(path)
        if found is None:
            raise ValueError(f"{path} is not of the form {_LABEL}[reduce-zero-to-NUMBER]@FILE.")
        return found["file"], None if found["ignored"] is None else int(found["ignored"])

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(self._parse(path)[0])

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        self._check_mode(path, mode)
        file, ignored = self._parse(path)
        labels = _read_indices(file)
        if ignored is not None:
            labels = np.where((labels == 0) | (labels == ignored), ignored, labels - 1)
        stream = io.BytesIO()
        Image.fromarray(labels.astype(np.uint8)).save(stream, "PPM")
        stream.seek(0)
        return stream


def _read_indices(file: str) -> np.ndarray:
    """Array [height, width] of the indices in an image.

    Raises:
        ValueError: for an image of colours, or of indices beyond a byte.
    """
    with Image.open(file) as image:
        if image.mode not in _INDEX_MODES:
            text = "but class indices in one channel or with a palette are expected"
            raise ValueError(f"it has several channels (mode {image.mode}), {text}")
        factor = _SCALED.get(str(image.tile[0][3]), 1) if image.tile else 1
        indices = np.array(image) // factor
    if indices.dtype != bool and indices.max(initial=0) > _MAX_LABEL:
        raise ValueError(f"it has the label {indices.max()}, but at most {_MAX_LABEL} is expected")
    return indices.astype(np.uint8)


for _handler in (TarMembers(), Labels()):
    PathManager.register_handler(_handler, allow_override=True)
