"""Paths of files inside tar files and of label images, opened as Detectron2 opens files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from xlearner_d2.data.files import label_path, tar_member_path


def test_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a#1.tar").write_bytes(b"0123456789")
    path = tar_member_path(tmp_path / "a#1.tar", offset=3, size=4, name="x/#5+1#.jpg")
    assert PathManager.isfile(path)
    assert PathManager.exists(path)
    with PathManager.open(path, "rb") as stream:
        assert stream.read() == b"3456"
    assert not PathManager.isfile(tar_member_path(tmp_path / "a#1.tar", offset=7, size=4, name="x"))
    assert not PathManager.isfile(tar_member_path(tmp_path / "b.tar", offset=0, size=0, name="x"))


LABELS = arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5)))


@given(LABELS, st.sampled_from(["L", "P", "I;16"]))
def test_indices_whatever_the_mode(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray, mode: str) -> None:
    file = tmp_path_factory.mktemp("labels") / "a.png"
    image = Image.fromarray(labels.astype(np.uint16) if mode == "I;16" else labels)
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    image.save(file)
    path = label_path(file)
    assert PathManager.isfile(path)
    assert (utils.read_image(path, "L")[..., 0] == labels).all()  # as Detectron2's mapper reads them


@given(LABELS, st.sampled_from([255, 0, 254, 19]))
def test_reduced_labels(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray, ignored: int) -> None:
    file = tmp_path_factory.mktemp("labels") / "a.png"
    Image.fromarray(labels).save(file)
    expected = [[ignored if k in (0, ignored) else k - 1 for k in row] for row in labels.tolist()]
    assert utils.read_image(label_path(file, reduce_zero_to=ignored), "L")[..., 0].tolist() == expected


def test_black_and_white_labels_are_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1").save(tmp_path / "a.png")
    assert utils.read_image(label_path(tmp_path / "a.png"), "L")[..., 0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_labels_of_few_bits(tmp_path: Path, bits: int) -> None:
    """Which Pillow reads as shades from black to white."""
    wanted = np.arange(2**bits, dtype=np.uint8)[None]
    packed = np.packbits(np.unpackbits(wanted.T, axis=1)[:, -bits:].ravel()).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", wanted.size, 1, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert utils.read_image(label_path(tmp_path / "a.png"), "L")[..., 0].tolist() == wanted.tolist()


def test_labels_that_are_no_indices(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"mode RGB\), but class indices in one channel or with a palette"):
        utils.read_image(label_path(tmp_path / "a.png"), "L")
    Image.fromarray(np.array([[256]], np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="it has the label 256, but at most 255 is expected"):
        utils.read_image(label_path(tmp_path / "b.png"), "L")


@pytest.mark.parametrize("path", ["tar-member://a.tar#x+1#b", "label://x@b"])
def test_malformed_paths(path: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        PathManager.open(path, "rb")


def test_files_are_not_for_writing(tmp_path: Path) -> None:
    for path in (tar_member_path("a.tar", offset=0, size=1, name="b"), label_path("a.png")):
        with pytest.raises(ValueError, match="can only be opened with the mode 'rb', not 'w'"):
            PathManager.open(path, "w")
