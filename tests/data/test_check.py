"""Checks of records and files: silent on good data, and naming file, finding and expectation on bad data."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from xlearner_d2.data.check import check_records, check_same_classes
from xlearner_d2.data.classification import ClassificationMapper
from xlearner_d2.data.files import label_path, tar_member_path
from xlearner_d2.data.problems import Problems

Records = list[dict[str, Any]]
META = Metadata(
    name="set", thing_classes=["cat", "dog"], stuff_classes=["road", "sky"], classes=["x", "y"], ignore_label=255
)


def make_records(root: Path, count: int = 3) -> Records:
    """Images of 12 x 8 pixels with a box, a label PNG and a class each."""
    records = []
    labels = np.zeros((8, 12), np.uint8)
    labels[0, :2] = 1, 255
    for number in range(count):
        image, label = root / f"{number}.jpg", root / f"{number}.png"
        Image.effect_noise((12, 8), 90).convert("RGB").save(image)
        Image.fromarray(labels).save(label)
        box = {"bbox": [1, 2, 11, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
        record = {"file_name": str(image), "image_id": number, "height": 8, "width": 12, "category_id": 0}
        records.append({**record, "sem_seg_file_name": str(label), "annotations": [box]})
    return records


def check(records: Records, *, max_images: int = -1, metadata: Metadata = META) -> list[str]:
    return check_records("set", records, metadata, max_images=max_images)


def test_good_records_have_no_problem(tmp_path: Path) -> None:
    assert check(make_records(tmp_path)) == []


def test_no_records() -> None:
    assert check([]) == ["data set 'set': there are no images, but at least one is expected."]


def relabel(label: np.ndarray) -> Callable[[Records], object]:
    return lambda records: Image.fromarray(label).save(records[1]["sem_seg_file_name"])


def rebox(*box: float, mode: BoxMode = BoxMode.XYXY_ABS) -> Callable[[Records], object]:
    return lambda records: records[1]["annotations"][0].update(bbox=list(box), bbox_mode=mode)


def cut(key: str, size: int) -> Callable[[Records], object]:
    """Keep the first bytes of a file; noise makes the files large enough to lose something."""

    def spoil(records: Records) -> None:
        path = Path(records[1][key])
        stream = io.BytesIO()
        noise = Image.effect_noise((64, 64), 90)
        noise.save(stream, "JPEG" if path.suffix == ".jpg" else "PNG")
        if key == "file_name":
            records[1].update(height=64, width=64)
        path.write_bytes(stream.getvalue()[:size])

    return spoil


def palette(records: Records) -> None:
    Image.new("P", (12, 8)).save(records[1]["sem_seg_file_name"])


BAD: dict[str, tuple[Callable[[Records], object], str]] = {
    "no file name": (lambda records: records[1].pop("file_name"), "record 1 lacks a 'file_name'"),
    "missing image": (lambda records: Path(records[1]["file_name"]).unlink(), "1.jpg does not exist"),
    "missing label": (lambda records: Path(records[1]["sem_seg_file_name"]).unlink(), "1.png does not exist"),
    "empty image": (cut("file_name", 0), "1.jpg cannot be decoded as an image: it is in no known image format"),
    "truncated image": (cut("file_name", 1500), "1.jpg cannot be decoded as an image: image file is truncated"),
    "truncated label": (cut("sem_seg_file_name", 900), "1.png cannot be read as a label image: "),
    "not an image": (
        lambda records: Path(records[1]["file_name"]).write_text("<html></html>"),
        "1.jpg cannot be decoded as an image: it is in no known image format",
    ),
    "16-bit image": (
        lambda records: Image.new("I;16", (12, 8), 900).save(records[1]["file_name"], "PNG"),
        "1.jpg has the mode I;16, but 8 bits a channel are expected, as all above 255 would become white",
    ),
    "wrong size": (
        lambda records: records[1].update(width=13),
        "1.jpg is 12 x 8 pixels, but its annotation says 13 x 8",
    ),
    "repeated id": (lambda records: records[1].update(image_id=0), "image_id 0 occurs 2 times, but once is expected"),
    "class of an image": (lambda records: records[1].update(category_id=2), "class index 2, but 0 to 1 is expected"),
    "class as text": (lambda records: records[1].update(category_id="x"), "class index 'x', but 0 to 1 is expected"),
    "class of a box": (
        lambda records: records[1]["annotations"][0].update(category_id=-1),
        "1.jpg has the class index -1, but 0 to 1 is expected",
    ),
    "no class": (lambda records: records[1]["annotations"][0].pop("category_id"), "class index None, but 0 to 1"),
    "empty box": (rebox(3, 3, 3, 5), "is 0 x 2 pixels, but a positive width and height are expected"),
    "turned box": (rebox(5, 1, 3, 5), "is -2 x 4 pixels, but a positive width"),
    "box without height": (rebox(3, 3, 3, 0, mode=BoxMode.XYWH_ABS), "(x, y, width, height) is 3 x 0 pixels"),
    "box that is no number": (rebox(0, 0, float("nan"), 3), "is nan x 3 pixels"),
    "box too far right": (rebox(1, 1, 14, 5), "(left, top, right, bottom) exceeds its image of width 12 and height 8"),
    "box too far up": (rebox(1, -2, 5, 5), "exceeds its image of width 12 and height 8"),
    "size of a label": (relabel(np.zeros((12, 8), np.uint8)), "1.png is 8 x 12 pixels, but its image is 12 x 8"),
    "value of a label": (
        relabel(np.full((8, 12), 7, np.uint8)),
        "1.png has the label 7 (96 pixels), but 0 to 1, or 255 to ignore, is expected",
    ),
    "colour label": (relabel(np.zeros((8, 12, 3), np.uint8)), "1.png has the mode RGB, but class indices in one 8-bit"),
    "16-bit label": (relabel(np.zeros((8, 12), np.uint16)), "1.png has the mode I;16, but class indices in one 8-bit"),
    "palette label": (palette, "1.png has the mode P, but class indices in one 8-bit channel (mode L) are expected"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records(tmp_path: Path, spoil: Callable[[Records], object], message: str) -> None:
    records = make_records(tmp_path)
    spoil(records)
    (problem,) = check(records)
    assert problem.startswith("data set 'set': ")
    assert message in problem


def test_everything_is_reported_at_once_and_shortened(tmp_path: Path) -> None:
    records = make_records(tmp_path, 9)
    for record in records:
        Path(record["file_name"]).unlink()
        record["image_id"] = 1
    assert check(records) == [
        "data set 'set': image_id 1 occurs 9 times, but once is expected.",
        *(f"data set 'set': {record['file_name']} does not exist." for record in records[:5]),
        "data set 'set': … and 4 more missing files.",
    ]


def test_decodes_a_share_of_the_images_but_looks_for_all(tmp_path: Path) -> None:
    records = make_records(tmp_path, 9)
    for number in (0, 1, 2, 4, 8):
        Path(records[number]["file_name"]).write_bytes(b"")
    Path(records[5]["file_name"]).unlink()
    first, *decoded = check(records, max_images=3)
    assert first.endswith("5.jpg does not exist.")
    assert [problem.split(" cannot")[0][-5:] for problem in decoded] == ["0.jpg", "4.jpg", "8.jpg"]
    assert len(check(records, max_images=0)) == 1


def test_boxes_that_are_shares_of_the_image(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    for record in records:
        record["annotations"][0].update(bbox=[0.1, 0.2, 0.5, 0.7])
    (problem,) = check(records)
    assert "all 3 boxes are in the first pixel of their image: pixels are expected" in problem
    records[0]["annotations"][0].update(bbox=[1, 2, 11, 6])
    assert check(records) == []


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 2, 12, 2, 12, 8, 1, 8]], ""),
        ([[1, 2, 3, 2, 3, 4], [9, 6, 12, 8, 9, 8]], ""),
        (rle.encode(np.ones((8, 12), np.uint8, order="F")), ""),
        (rle.encode(np.ones((12, 8), np.uint8, order="F")), "object 1 is 8 x 12 pixels, but its image is 12 x 8"),
        ({"size": [8, 12], "counts": b"no!"}, "the mask of object 1 is no RLE: "),
        (
            [[0.1, 0.2, 1.0, 0.2, 1.0, 1.0]],
            "object 1 lies from [0.1, 0.2] to [1.0, 1.0], but its box from [6, 2] to",
        ),
    ],
)
def test_masks(tmp_path: Path, mask: Any, message: str) -> None:
    records = make_records(tmp_path)
    box = [6, 2, 6, 6] if message.startswith("object 1 lies") else [1, 2, 11, 6]
    records[1]["annotations"][0].update(segmentation=mask, bbox=box)
    problems = check(records)
    assert [message in problem for problem in problems] == ([True] if message else [])


def test_few_degenerate_boxes_are_tolerated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = make_records(tmp_path, 1)
    good = records[0]["annotations"][0]
    bad = {**good, "bbox": [3, 3, 0, 2]}
    records[0]["annotations"] = [good] * 9999 + [bad]
    assert check(records) == []
    assert "1 of 10000 boxes will be dropped" in caplog.text
    records[0]["annotations"].append(bad)
    assert len(check(records)) == 2


def test_label_images_without_a_label_are_told_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = make_records(tmp_path)
    assert check(records) == []
    assert caplog.text == ""
    relabel(np.full((8, 12), 255, np.uint8))(records)
    assert check(records) == []
    wanted = f"nothing is learned from 1 of the 3 label images that were decoded: {records[1]['sem_seg_file_name']} has"
    assert f"data set 'set': {wanted} the label 255 alone, which is ignored." in caplog.text


def test_classes_without_a_pixel_are_told_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = make_records(tmp_path)
    for record in records:
        Image.fromarray(np.array([[0, 255] * 6] * 8, np.uint8)).save(record["sem_seg_file_name"])
    assert check(records) == []
    wanted = "1 of 2 classes have no pixel in the label images that were decoded: sky. Masks of 0 and 255 need 1"
    assert f"data set 'set': {wanted} instead of 255, which is ignored." in caplog.text


def test_turned_by_exif_like_detectron2(tmp_path: Path) -> None:
    (record,) = make_records(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 12)).save(record["file_name"], exif=exif)
    assert check([record]) == []
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    assert mapper({key: record[key] for key in ("file_name", "height", "width")})["image"].shape == (3, 8, 12)


def test_a_size_of_the_picture_as_stored_is_told_apart(tmp_path: Path) -> None:
    (record,) = make_records(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(record["file_name"], exif=exif)
    told = "is 8 x 12 pixels, but its annotation says 12 x 8. An EXIF tag turns it by a right angle"
    assert told in check([record])[0]
    Image.new("RGB", (8, 12)).save(record["file_name"])
    assert check([record])[0].endswith("is 8 x 12 pixels, but its annotation says 12 x 8.")


def test_broken_exif_is_no_damage_as_for_detectron2(tmp_path: Path) -> None:
    (record,) = make_records(tmp_path, 1)
    record["file_name"] = str(tmp_path / "broken.jpg")
    Image.new("RGB", (12, 8)).save(record["file_name"], exif=b"Exif\0\0this is none", dpi=(72, 72))
    with Image.open(record["file_name"]) as image, pytest.raises(SyntaxError):
        image.getexif()
    assert check([record]) == []
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    assert mapper({key: record[key] for key in ("file_name", "height", "width")})["image"].shape == (3, 8, 12)
    labelled = ClassificationMapper(image_format="BGR", is_train=False, size=8)
    assert labelled({"file_name": record["file_name"], "category_id": 0})["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(("orientation", "told"), [(1, False), (3, True), (6, False)])
def test_turned_in_a_way_that_sizes_do_not_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, orientation: int, told: bool
) -> None:
    (record,) = make_records(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 12) if orientation == 6 else (12, 8)).save(record["file_name"], exif=exif)
    assert check([record]) == []
    text = f"mirrors 1 of the 1 images that were decoded, such as {record['file_name']}. They are read"
    assert (text in caplog.text) == told


def test_files_in_others_are_named_as_they_are_on_disk(tmp_path: Path) -> None:
    (record,) = make_records(tmp_path, 1)
    png, tar = record["sem_seg_file_name"], tmp_path / "shard.tar"
    Image.new("RGB", (12, 8)).save(png)
    record["sem_seg_file_name"] = label_path(png, reduce_zero_to=255)
    wanted = "cannot be read as a label image: it has several channels (mode RGB), but class indices in one channel or"
    assert check([record])[0].startswith(f"data set 'set': {png} {wanted}")
    record["file_name"] = tar_member_path(tar, offset=0, size=9, name="7.jpg")
    assert check([record])[0] == f"data set 'set': 7.jpg in {tar} does not exist."


def test_metadata_without_classes(tmp_path: Path) -> None:
    records = make_records(tmp_path, 1)
    problems = check(records, metadata=Metadata(name="bare"))
    assert sum("the metadata has no class names" in problem for problem in problems) == 2
    assert sum("the metadata has no stuff_classes" in problem for problem in problems) == 1


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("classes", ["a", "c", "b"], "class 1 is 'b' in the first and 'c' in the second (the first has 3 and"),
        ("thing_classes", ["a", "b"], "the first has 3 and the second 2; only the first has 'c'"),
        ("stuff_classes", ["a", "b", "c", "d"], "the first has 3 and the second 4; only the second has 'd'"),
        ("thing_classes", None, "only the first has any"),
    ],
)
def test_different_classes(key: str, other: list[str] | None, message: str) -> None:
    names = ("x_first", "x_same", "x_other")
    for name, classes in zip(names, (["a", "b", "c"], ["a", "b", "c"], other), strict=True):
        MetadataCatalog.pop(name, None)
        DatasetCatalog.pop(name, None)
        if classes:
            MetadataCatalog.get(name).set(**{key: classes})
    (problem,) = check_same_classes(names)
    assert problem.startswith(f"data sets 'x_first' and 'x_other' should have the same {key}, but ")
    assert message in problem
    assert check_same_classes(names[:2]) == check_same_classes(names[:1]) == []


@given(st.lists(st.sampled_from(["boxes", "files", "ids"]), max_size=40), st.integers(1, 6))
def test_shortening_keeps_the_count(kinds: list[str], limit: int) -> None:
    problems = Problems("set", limit=limit)
    for kind in kinds:
        problems.add(kind, f"bad {kind}")
    for kind in set(kinds):
        full = [line for line in problems.lines() if line == f"set: bad {kind}"]
        more = [line for line in problems.lines() if line.endswith(f"more {kind}.")]
        left = int(more[0].split()[3]) if more else 0
        assert len(full) + left == kinds.count(kind) == problems.count(kind)
        assert len(full) <= limit
