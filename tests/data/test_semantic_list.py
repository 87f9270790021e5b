"""A list of the images of a semantic split, where folders hold more than the split."""

from pathlib import Path

import pytest
from builtin_data import SEM_SPEC, changed, read, write_sem
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.builtin.semantic import _read_list
from xlearner_d2.specs import ConfigError

LISTED = changed(SEM_SPEC, list="sem/train.txt")


def write(root: Path, text: str, names: tuple[str, ...] = ("a", "b", "c")) -> None:
    write_sem(root, names)
    (root / "sem/train.txt").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "c\na\n",
        "c.jpg\n\na.jpg",
        "/JPEGImages/c.jpg /SegmentationClassAug/c.png\r\n/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\n",
    ],
)
def test_listed_images_in_their_order(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, text)
    (tmp_path / "sem/labels/b.png").unlink()
    everything = {Path(record["file_name"]).stem: record for record in read(SEM_SPEC, tmp_path)}
    caplog.clear()
    assert read(LISTED, tmp_path) == [everything["c"], everything["a"]]
    assert not caplog.records  # an image that is not listed needs no label


def test_an_unlisted_label_needs_no_image(tmp_path: Path) -> None:
    write(tmp_path, "a\n")
    (tmp_path / "sem/images/b.jpg").unlink()
    assert len(read(LISTED, tmp_path)) == 1


def test_names_with_dots(tmp_path: Path) -> None:
    write(tmp_path, "frame.0001\nframe.0002.jpg\n", ("frame.0001", "frame.0002"))
    records = read(LISTED, tmp_path)
    assert [Path(record["file_name"]).name for record in records] == ["frame.0001.jpg", "frame.0002.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"LIST: .*train\.txt is empty, but one image name a line"),
        ("a\nd\n", r"LIST has 'd', but .*sem/images has no image of that name"),
        ("a\na.jpg\n", r"train\.txt, line 2: 'a' is in line 1 already"),
        ("a.jpg a.png a.png\n", r"train\.txt, line 1: got 'a\.jpg a\.png a\.png', but one image, or it and its label"),
    ],
)
def test_bad_lists(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        read(LISTED, tmp_path)


def test_a_missing_list(tmp_path: Path) -> None:
    write_sem(tmp_path)
    with pytest.raises(ConfigError, match=r"LIST: there is no file .*sem/train\.txt"):
        read(LISTED, tmp_path)


def test_a_listed_image_without_a_label(tmp_path: Path) -> None:
    write(tmp_path, "b\n")
    (tmp_path / "sem/labels/b.png").unlink()
    with pytest.raises(ConfigError, match=r"LIST has 'b', but .*sem/labels has no label PNG of that name"):
        read(LISTED, tmp_path)


NAMES = st.lists(st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True), min_size=1, max_size=8, unique=True)


@given(NAMES, st.sampled_from(["{0}", "{0}.jpg", "x/y/{0}.png", "/i/{0}.JPEG /l/{0}.png"]))
@settings(max_examples=25)
def test_every_form_of_a_list_names_the_same(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], form: str
) -> None:
    path = tmp_path_factory.mktemp("list") / "train.txt"
    path.write_text("\n".join(form.format(name) for name in names))
    assert [(Path(image).stem, Path(label).stem) for image, label in _read_list(LISTED, path)] == [
        (name, name) for name in names
    ]
