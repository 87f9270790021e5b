"""Lists of images with their labels: csv and text files in the forms that are in use."""

import csv
from pathlib import Path
from typing import Any

import pytest
from builtin_data import changed, read, save_image
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.check import check_records
from xlearner_d2.specs import ConfigError, DatasetSpec

SPEC = DatasetSpec(name="x_list", format="image_list", list="birds/list.csv")
SEVERAL = changed(SPEC, multi_label=True)


def listed(root: Path, text: str, spec: DatasetSpec = SPEC) -> list[tuple[str, Any]]:
    """Path in the list and names of the classes of each record."""
    (root / "birds").mkdir(exist_ok=True)
    (root / spec.list).write_text(text)
    classes = []
    for record in read(spec, root):
        found = record.get("category_ids", [record.get("category_id")])
        names = [MetadataCatalog.get(spec.name).classes[index] for index in found]
        classes.append((record["image_id"], names if spec.multi_label else names[0]))
    return classes


FORMS = {
    "csv": "a.jpg,heron\nb.jpg,stork\n",
    "csv with a header": "image,species\na.jpg,heron\nb.jpg,stork\n",
    "known columns among others": "id,label,file_name,split\n1,heron,a.jpg,x\n2,stork,b.jpg,x\n",
    "other columns, in capitals": "ID,Path,Class\n1,a.jpg,heron\n2,b.jpg,stork\n",
    "semicolons": "path;label\na.jpg;heron\nb.jpg;stork\n",
    "tabs": "a.jpg\theron\nb.jpg\tstork\n",
    "label and path": "heron,a.jpg\nstork,b.jpg\n",
    "text": "a.jpg heron\nb.jpg stork\n",
    "text with a header": "path label\na.jpg heron\nb.jpg stork\n",
    "Windows": "\ufeffa.jpg,heron\r\nb.jpg,stork\r\n\r\n",
    "quotes": 'path,label\n"a.jpg","heron"\n"b.jpg", "stork"\n',
    "one line without its end": "a.jpg,heron\nb.jpg,stork",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list(form: str, tmp_path: Path) -> None:
    assert listed(tmp_path, FORMS[form]) == [("a.jpg", "heron"), ("b.jpg", "stork")]


def test_a_first_line_with_an_image_of_another_kind_is_no_header(tmp_path: Path) -> None:
    assert listed(tmp_path, "a.jfif,heron\nb.gif,stork\n") == [("a.jfif", "heron"), ("b.gif", "stork")]


def test_text_with_spaces_in_paths_and_labels(tmp_path: Path) -> None:
    found = listed(tmp_path, "my birds/a 1.jpg grey heron\nmy birds/b.JPEG stork\n")
    assert found == [("my birds/a 1.jpg", "grey heron"), ("my birds/b.JPEG", "stork")]


@pytest.mark.parametrize("columns", [("picture", "species"), (2, 0), (2, "species")])
def test_columns_by_name_or_number(columns: tuple[Any, ...], tmp_path: Path) -> None:
    text = "species,label,picture\nheron,1,a.jpg\nstork,2,b.jpg\n"
    assert listed(tmp_path, text, changed(SPEC, columns=columns)) == [("a.jpg", "heron"), ("b.jpg", "stork")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_that_are_not_asked_for_are_no_part_of_a_label(separator: str, tmp_path: Path) -> None:
    rows = [("file_name", "species", "place"), ("a.jpg", "grey heron", "lake"), ("b.jpg", "stork", "pond")]
    text = "".join(separator.join(row) + "\n" for row in rows)
    found = [("a.jpg", "grey heron"), ("b.jpg", "stork")]
    assert listed(tmp_path, text, changed(SPEC, columns=("file_name", "species"))) == found
    assert listed(tmp_path, text.partition("\n")[2], changed(SPEC, columns=(0, 1))) == found
    with pytest.raises(ConfigError, match="give those of the path and of the label as COLUMNS"):
        listed(tmp_path, text)


def test_what_stands_beyond_the_columns(tmp_path: Path) -> None:
    found = [("a.jpg", "heron"), ("b.jpg", "stork")]
    assert listed(tmp_path, "path,label\na.jpg,heron,\nb.jpg,stork\n") == found
    assert listed(tmp_path, "birds\na.jpg,heron\nb.jpg,stork\n") == found
    for text in ("a.jpg,heron\nb.jpg,stork,tern\n", "path,label\na.jpg,heron,grey\nb.jpg,stork\n"):
        with pytest.raises(ConfigError, match="but 2 columns, as in the first line, are expected"):
            listed(tmp_path, text)


def test_columns_without_a_header(tmp_path: Path) -> None:
    found = listed(tmp_path, "7,heron,a.jpg\n8,stork,b.jpg\n", changed(SPEC, columns=(2, 1)))
    assert found == [("a.jpg", "heron"), ("b.jpg", "stork")]


@pytest.mark.parametrize(
    ("labels", "classes", "names", "indices"),
    [
        ("stork heron stork", (), ["heron", "stork"], [1, 0, 1]),
        ("10 9 2", (), ["2", "9", "10"], [2, 1, 0]),
        ("1 0 1", ("heron", "stork"), ["heron", "stork"], [1, 0, 1]),
        ("heron 2 ant", ("stork", "heron", "ant"), ["stork", "heron", "ant"], [1, 2, 2]),
        ("2 1 0", ("2", "1", "0"), ["2", "1", "0"], [0, 1, 2]),  # a name comes before a number
    ],
)
def test_labels_are_names_or_numbers(
    labels: str, classes: tuple[str, ...], names: list[str], indices: list[int], tmp_path: Path
) -> None:
    listed(tmp_path, "".join(f"{n}.jpg,{label}\n" for n, label in enumerate(labels.split())))
    records = read(changed(SPEC, classes=classes), tmp_path)
    assert MetadataCatalog.get("x_list").classes == names
    assert [record["category_id"] for record in records] == indices


@pytest.mark.parametrize(
    "text",
    ["a.jpg,heron;stork\nb.jpg,\nc.jpg,stork\n", "a.jpg,stork heron heron\nb.jpg,\nc.jpg,stork\n"],
    ids=["semicolons", "spaces"],
)
def test_several_labels(text: str, tmp_path: Path) -> None:
    assert listed(tmp_path, text, SEVERAL) == [("a.jpg", ["heron", "stork"]), ("b.jpg", []), ("c.jpg", ["stork"])]
    assert MetadataCatalog.get("x_list").evaluator_type == "multi_label"


def test_a_lone_label_with_a_space_among_several_with_semicolons(tmp_path: Path) -> None:
    found = listed(tmp_path, "a.jpg,heron;grey stork\nb.jpg,grey stork\n", SEVERAL)
    assert found == [("a.jpg", ["grey stork", "heron"]), ("b.jpg", ["grey stork"])]


def test_several_labels_in_a_text_file(tmp_path: Path) -> None:
    found = listed(tmp_path, "a.jpg heron stork\nb.jpg stork\n", SEVERAL)
    assert found == [("a.jpg", ["heron", "stork"]), ("b.jpg", ["stork"])]


def test_paths_start_at_the_list_or_at_images(tmp_path: Path) -> None:
    save_image(tmp_path / "birds/a.jpg")
    save_image(tmp_path / "pictures/a.jpg")
    listed(tmp_path, f"a.jpg,heron\n{tmp_path}/pictures/a.jpg,stork\n")
    metadata = MetadataCatalog.get("x_list")
    records = read(SPEC, tmp_path)
    assert [record["file_name"] for record in records] == [f"{tmp_path}/{name}/a.jpg" for name in ("birds", "pictures")]
    assert check_records("x_list", records, metadata, max_images=-1) == []
    (tmp_path / "birds/list.csv").write_text("a.jpg,heron\n")
    (record,) = read(changed(SPEC, images="pictures"), tmp_path)
    assert record["file_name"] == f"{tmp_path}/pictures/a.jpg"
    (tmp_path / "birds/list.csv").write_text(f"/a.jpg,heron\n{tmp_path}/pictures/b.jpg,heron\n")
    save_image(tmp_path / "pictures/b.jpg")
    records = read(changed(SPEC, images="pictures"), tmp_path)  # with a slash, as in the list of Places365
    assert [record["file_name"] for record in records] == [f"{tmp_path}/pictures/{name}.jpg" for name in "ab"]


def test_absolute_paths_lead_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "data/pictures/a.jpg")
    save_image(tmp_path / "elsewhere/b.jpg")
    (tmp_path / "data/birds").mkdir()
    names = [f"{tmp_path}/data/pictures/a.jpg", f"{tmp_path}/elsewhere/b.jpg"]
    (tmp_path / "data/birds/list.csv").write_text("".join(f"{name},heron\n" for name in names))
    monkeypatch.chdir(tmp_path)
    records = read(changed(SPEC, images="pictures"), Path("data"))
    assert [record["file_name"] for record in records] == names


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("", {}, r"LIST: .*list\.csv has no image, but one a line is expected, followed by its label"),
        ("path,label\n", {}, r"list\.csv has no image"),
        ("a.jpg,x\na.jpg,x\n", {}, r"list\.csv, line 2: a\.jpg is in line 1 already"),
        ("path,label\na.jpg,\n", {}, r"list\.csv, line 2: a\.jpg has no label, but one is expected"),
        ("a.jpg,x\nb.jpg,x\nc.jpg\n", {}, r"line 3: got \['c\.jpg'\], but a path in column 0 and a label in column 1"),
        ("a.jpg,x,1\nb.jpg,y,1\n", {}, r"has 3 columns and no header; give those .* as COLUMNS, by name or by number"),
        ("id,photo,kind\n1,a.jpg,x\n", {}, r"has the columns id, photo, kind; give those .* as COLUMNS"),
        (
            "id,photo\n1,a.jpg\n",
            {"columns": ("photo", "lable")},
            r"COLUMNS: .* has no column 'lable'\. Known: id, photo",
        ),
        ("1,a.jpg\n", {"columns": (1, 2)}, r"has no column 2\. It has no header and 2 columns, numbered from 0"),
        ("1,a.jpg\n", {"columns": ("photo", "kind")}, r"has no column 'photo'\. It has no header"),
        ("1,a.jpg\n", {"columns": (1,)}, r"COLUMNS is \[1\], but two are expected"),
        ("a.jpg,heorn\n", {"classes": ("heron", "stork")}, r"a\.jpg has the label 'heorn', but one of the 2 classes"),
        ("a.jpg,heorn\n", {"classes": ("heron", "stork")}, r"Did you mean 'heron'\?"),
        ("a.jpg,2\n", {"classes": ("heron", "stork")}, r"line 1: .* '2', but .* a number from 0 to 1, is expected"),
        ("a.jpg,heron;stork\n", {"classes": ("heron", "stork")}, r"Set MULTI_LABEL: True if these are several labels"),
        ("a.jpg,Cat\nb.jpg,cat\n", {}, r"the labels 'Cat' and 'cat' differ in capitals, spaces or leading zeros alone"),
        (
            "a.jpg,02\nb.jpg,2\n",
            {},
            r"the labels '02' and '2' differ in .* if both are meant, list all classes in",
        ),
        ("a.jpg,heron;stork\n", {}, r"has the label 'heron;stork'\. Set MULTI_LABEL: True if these are several labels"),
        ('a.jpg,"x,y"\n', {"multi_label": True}, r"the label 'x,y', but several labels are separated by semicolons"),
        ("a.jpg,x\n", {"images": "nowhere"}, r"IMAGES: .*nowhere is nothing, but a folder is expected"),
        ("a.jpg,x\n", {"list": "birds/other.csv"}, r"LIST: there is no file .*other\.csv"),
    ],
)
def test_bad_lists(text: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds/list.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        register_datasets([changed(SPEC, **change)], tmp_path)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=6)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6, unique_by=lambda row: row[0]))
@settings(max_examples=40)
def test_whatever_csv_can_hold_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("list")
    (root / "birds").mkdir()
    with (root / "birds/list.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label"])
        writer.writerows((f"{name}.jpg", label) for name, label in rows)
    records = read(changed(SPEC, classes=tuple(sorted({label for _, label in rows}))), root)
    classes = MetadataCatalog.get("x_list").classes
    found = [(record["image_id"], classes[record["category_id"]]) for record in records]
    assert found == [(f"{name}.jpg", label) for name, label in rows]
