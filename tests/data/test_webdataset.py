"""Shards of the webdataset project: written by its own writer, and the same to its own reader and to ours."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_data import changed, read
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from PIL import Image
from webdataset import ShardWriter, TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.builtin.torchvision_files import CACHE
from xlearner_d2.data.check import check_records
from xlearner_d2.data.classification import ClassificationMapper
from xlearner_d2.specs import ConfigError, DatasetSpec

SPEC = DatasetSpec(name="x_shards", format="webdataset", shards="birds/train-{000000..000002}.tar")


def jpg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (value, value, value)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_shards(root: Path, *, count: int = 9, each: int = 3) -> None:
    (root / "birds").mkdir()
    with ShardWriter(str(root / "birds/train-%06d.tar"), maxcount=each, verbose=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"day{number % 2}/bird {number}", "jpg": jpg(20 * number), "cls": number % 3})


def write_tar(root: Path, *samples: dict[str, Any], name: str = "one.tar") -> DatasetSpec:
    (root / "birds").mkdir(exist_ok=True)
    with TarWriter(str(root / "birds" / name)) as writer:
        for sample in samples:
            writer.write(sample)
    return changed(SPEC, shards=f"birds/{name}")


def test_records_equal_what_webdataset_reads(tmp_path: Path) -> None:
    write_shards(tmp_path)
    records = read(SPEC, tmp_path)
    paths = sorted((tmp_path / "birds").glob("*.tar"))
    streams = ({"url": str(path), "stream": path.open("rb")} for path in paths)
    samples = list(group_by_keys(tar_file_expander(streams)))
    assert len(records) == len(samples) == 9
    for record, sample in zip(records, samples, strict=True):
        with PathManager.open(record["file_name"], "rb") as stream:
            assert stream.read() == sample["jpg"]
        assert record["image_id"] == sample["__key__"]
        assert record["category_id"] == int(sample["cls"])
    metadata = MetadataCatalog.get("x_shards")
    assert (metadata.classes, metadata.evaluator_type) == (["0", "1", "2"], "classification")


def test_images_are_read_in_any_order_by_all_that_read_images(tmp_path: Path) -> None:
    write_shards(tmp_path)
    records = read(SPEC, tmp_path)
    assert check_records("x_shards", records, MetadataCatalog.get("x_shards"), max_images=-1) == []
    mapper = ClassificationMapper(image_format="RGB", is_train=False, size=8)
    for number in (7, 0, 4):
        value = 20 * number
        assert abs(int(np.median(utils.read_image(records[number]["file_name"], "BGR"))) - value) <= 2
        assert abs(int(mapper(records[number])["image"].median()) - value) <= 2


def test_classes_by_name_and_shards_by_pattern(tmp_path: Path) -> None:
    write_tar(tmp_path, {"__key__": "a", "png": jpg(0), "cls": "heron"}, name="a.tar")
    write_tar(tmp_path, {"__key__": "b", "JPEG": jpg(0), "cls": "1", "json": "{}"}, name="b.tar")
    records = read(changed(SPEC, shards="birds/*.tar", classes=("heron", "stork")), tmp_path)
    assert [(record["image_id"], record["category_id"]) for record in records] == [("a", 0), ("b", 1)]


def test_the_index_is_kept_for_the_same_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 0})
    first = read(spec, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert read(spec, tmp_path) == first
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 0}, {"__key__": "b", "jpg": jpg(9), "cls": 0})
    assert [record["image_id"] for record in read(spec, tmp_path)] == ["a", "b"]
    (tmp_path / "birds" / CACHE / "webdataset/one.tar.json").write_text("{")
    assert len(read(spec, tmp_path)) == 2


def test_an_index_that_cannot_be_kept_is_made_again(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 0})
    (tmp_path / "birds" / CACHE).write_text("in the way")
    assert len(read(spec, tmp_path)) == len(read(spec, tmp_path)) == 1


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"jpg": jpg(0)}, r"one\.tar: 'a' has the members jpg, but one image, such as jpg, and its label, cls, are"),
        ({"cls": 0}, r"one\.tar: 'a' has the members cls, but one image"),
        ({"jpg": jpg(0), "png": jpg(0), "cls": 0}, r"'a' has the members .*jpg, png.*, but one image"),
        (
            {"jpg": jpg(0), "cls": "ox"},
            r"one\.tar: 'a' has the label 'ox', but one of the 2 classes, or a number from 0",
        ),
        ({"jpg": jpg(0), "cls": 2}, r"'a' has the label '2', but .* a number from 0 to 1, is expected"),
    ],
)
def test_bad_samples(sample: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", **sample})
    with pytest.raises(ConfigError, match=message):
        register_datasets([changed(spec, classes=("heron", "stork"))], tmp_path)


def test_a_number_that_is_no_class_of_numbers(tmp_path: Path) -> None:
    """It might be an index, or a slip."""
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 1})
    with pytest.raises(ConfigError, match=r"'a' has the label '1', but one of the 3 classes is expected"):
        register_datasets([changed(spec, classes=("5", "7", "9"))], tmp_path)


def test_a_number_that_is_the_index_of_its_own_class(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 1})
    assert read(changed(spec, classes=("000", "001", "two")), tmp_path)[0]["category_id"] == 1
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": "01"})
    assert read(changed(spec, classes=("heron", "stork")), tmp_path)[0]["category_id"] == 1


def test_repeated_keys(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path, {"__key__": "x", "jpg": jpg(0), "cls": 0}, name=name)
    with pytest.raises(ConfigError, match=r"b\.tar: the key 'x' is in .*a\.tar already, but keys should be unique"):
        register_datasets([changed(SPEC, shards="birds/*.tar")], tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
def test_broken_tar(keep: float, tmp_path: Path) -> None:
    spec = write_tar(tmp_path, *({"__key__": str(n), "jpg": jpg(0), "cls": 0} for n in range(20)))
    path = tmp_path / "birds/one.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) // 512 * 512 + 100])
    with pytest.raises(ConfigError, match=r"one\.tar cannot be read as an uncompressed tar file: .* Is it complete\?"):
        register_datasets([spec], tmp_path)


def test_a_shard_cut_after_it_was_indexed_is_found(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 0})
    records = read(spec, tmp_path)
    (tmp_path / "birds/one.tar").write_bytes(b"")
    (problem,) = check_records("x_shards", records, MetadataCatalog.get("x_shards"), max_images=-1)
    assert problem.endswith("a.jpg in " + str(tmp_path / "birds/one.tar") + " does not exist.")


def test_compressed_tar(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, {"__key__": "a", "jpg": jpg(0), "cls": 0}, name="one.tar.gz")
    with pytest.raises(ConfigError, match="Images cannot be read from the middle of a compressed file: uncompress it"):
        register_datasets([spec], tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            "birds/train-{000000..000003}.tar",
            r"SHARDS: there is no file .*train-000003\.tar\. Of this path, .*birds exists",
        ),
        ("birds/val-*.tar", r"SHARDS: no file is named like .*val-\*\.tar"),
        ("", "SHARDS is '', but the path of a tar file is expected"),
    ],
)
def test_missing_shards(shards: str, message: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ConfigError, match=message):
        register_datasets([changed(SPEC, shards=shards)], tmp_path)


def test_a_tar_without_samples(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    with tarfile.open(tmp_path / "birds/one.tar", "w"):
        pass
    with pytest.raises(ConfigError, match="hold no image with its label"):
        register_datasets([changed(SPEC, shards="birds/one.tar")], tmp_path)
