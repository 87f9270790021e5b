"""Readers of data sets on disk: clear about bad ones."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builtin_data import (
    COCO_SPEC,
    FOLDER_SPEC,
    OBJECT,
    SEM_SPEC,
    VOC_SPEC,
    changed,
    coco_json,
    read,
    save_image,
    write_coco,
    write_folder,
    write_sem,
    write_voc,
    write_xml,
)
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.specs import ConfigError, DatasetSpec


def edit_coco(path: str, value: Any) -> Callable[[Path], DatasetSpec]:
    """Set ``list.index.key`` in the json; None removes it."""

    def make(root: Path) -> DatasetSpec:
        data = coco_json()
        node: Any = data
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        if value is None:
            del node[last]
        else:
            node[last] = value
        write_coco(root, data)
        return COCO_SPEC

    return make


def raw_coco(text: str) -> Callable[[Path], DatasetSpec]:
    def make(root: Path) -> DatasetSpec:
        write_coco(root, text)
        return COCO_SPEC

    return make


def edit_voc(objects: str = "", **options: Any) -> Callable[[Path], DatasetSpec]:
    def make(root: Path) -> DatasetSpec:
        write_voc(root)
        write_xml(root, "b", objects, **options)
        return changed(VOC_SPEC, classes=("cat", "dog"))

    return make


def after(
    write: Callable[[Path], None], spec: DatasetSpec, action: Callable[[Path], object], **values: Any
) -> Callable[[Path], DatasetSpec]:
    """Write a good data set, spoil it, and use a changed record."""

    def make(root: Path) -> DatasetSpec:
        write(root)
        action(root)
        return changed(spec, **values)

    return make


def good_coco(root: Path) -> None:
    write_coco(root, coco_json())


def nothing(root: Path) -> None:
    """Leave a good data set as it is."""


BAD = {
    "coco: no file": (after(good_coco, COCO_SPEC, nothing, annotations="coco/box.json"), r"no file .*box\.json"),
    "coco: no images": (after(good_coco, COCO_SPEC, nothing, images="coco/image"), r"coco/image is nothing.* exists"),
    "coco: images is a file": (
        after(good_coco, COCO_SPEC, nothing, images="coco/boxes.json"),
        "is a file, but a folder",
    ),
    "coco: truncated": (raw_coco('{\n"images": ['), r"boxes\.json is not valid JSON: .*line 2 column"),
    "coco: a list": (raw_coco("[]"), "holds a list, but an object with images, annotations, categories"),
    "coco: no annotations": (edit_coco("annotations", None), "'annotations' is missing, but a list is expected"),
    "coco: no categories": (edit_coco("categories", []), "'categories' is empty, but at least one"),
    "coco: list of numbers": (edit_coco("images", [1]), "'images' holds something else than objects"),
    "coco: nameless category": (edit_coco("categories.1.name", None), r"categories\[1\] is .*'name' are expected"),
    "coco: repeated category": (edit_coco("categories.1.id", 7), r"categories\[1\] repeats the id or name"),
    "coco: unknown category": (edit_coco("annotations.1.category_id", 4), r"annotations\[1\] \(id 2\) .*category_id 4"),
    "coco: unknown image": (edit_coco("annotations.0.image_id", 9), r"image_id 9, but one of the ids in 'images'"),
    "coco: repeated image": (edit_coco("images.1.id", 2), r"images\[1\] \(id 2\) has the id of another image"),
    "coco: mixed image ids": (edit_coco("images.1.id", "1"), "ids of images are of type int, str"),
    "coco: no height": (edit_coco("images.0.height", None), r"height None, but a whole positive number of pixels"),
    "coco: half a pixel": (edit_coco("images.0.width", 24.0), r"width 24\.0, but a whole positive number of pixels"),
    "coco: no file name": (edit_coco("images.0.file_name", None), "file_name None, but a path below IMAGES"),
    "coco: repeated annotation": (edit_coco("annotations.1.id", 1), "repeats the id of another annotation"),
    "coco: no box": (edit_coco("annotations.0.bbox", []), r"bbox \[\], but four finite numbers"),
    "coco: infinite box": (edit_coco("annotations.0.bbox", [0, 0, 1, float("nan")]), "nan.*four finite numbers"),
    "coco: text as polygon": (edit_coco("annotations.0.segmentation", [["1"]]), "neither a list of polygons"),
    "coco: RLE without size": (edit_coco("annotations.0.segmentation", {"counts": [5]}), r"nor RLE \{size, counts\}"),
    "coco: text as keypoints": (edit_coco("annotations.0.keypoints", "x"), "'keypoints' that are no list of numbers"),
    "coco: ignored object": (edit_coco("annotations.0.ignore", 1), "'ignore' set, which Detectron2 does not support"),
    "voc: no split": (after(write_voc, VOC_SPEC, nothing, split="trian"), r"trian\.txt\. Did you mean 'train'\?"),
    "voc: no folder": (
        after(write_voc, VOC_SPEC, lambda root: (root / "voc/JPEGImages").rename(root / "voc/images")),
        "ROOT: .*JPEGImages is nothing, but a folder is expected",
    ),
    "voc: year": (after(write_voc, VOC_SPEC, nothing, year=2010), "YEAR is 2010, but 2007 or 2012"),
    "voc: empty split": (
        after(write_voc, VOC_SPEC, lambda root: (root / "voc/ImageSets/Main/train.txt").write_text("\n")),
        r"train\.txt is empty, but one image name a line",
    ),
    "voc: split of one class": (
        after(write_voc, VOC_SPEC, lambda root: (root / "voc/ImageSets/Main/train.txt").write_text("a\nb -1\n")),
        r"train\.txt, line 2: got 'b -1', but one image name",
    ),
    "voc: listed twice": (
        after(write_voc, VOC_SPEC, lambda root: (root / "voc/ImageSets/Main/train.txt").write_text("a\na\n")),
        "line 2: 'a' is listed twice",
    ),
    "voc: no annotation": (
        after(write_voc, VOC_SPEC, lambda root: (root / "voc/Annotations/b.xml").unlink()),
        r"there is no annotation .*b\.xml",
    ),
    "voc: broken XML": (edit_voc("<object>"), r"b\.xml is not valid XML: mismatched tag: line 3"),
    "voc: unknown class": (edit_voc(OBJECT.format("dgo", 1, 1, 2, 2)), r"b\.xml: object 1 is 'dgo'.*mean 'dog'"),
    "voc: similar classes": (
        after(write_voc, VOC_SPEC, lambda root: write_xml(root, "b", OBJECT.format("Dog", 1, 1, 2, 2))),
        "the labels 'Dog' and 'dog' differ in capitals, spaces or leading zeros alone",
    ),
    "voc: nameless object": (edit_voc("<object></object>"), "object 1 is None, which is not among the 2 classes"),
    "voc: text in a box": (edit_voc(OBJECT.format("dog", 1, "x", 2, 2)), "'ymin': 'x'.*four numbers"),
    "voc: size of zero": (edit_voc(size="<width>0</width><height>8</height>"), "size/width is '0', but a positive"),
    "voc: no size": (edit_voc(size=""), "size/height is '', but a positive"),
    "voc: no objects at all": (
        after(lambda root: write_voc(root, ("a",)), VOC_SPEC, lambda root: write_xml(root, "a", "")),
        "no XML file with a named object, so there are no classes; give CLASSES",
    ),
    "sem_seg: no classes": (after(write_sem, SEM_SPEC, nothing, classes="sem/name.txt"), r"no file .*name\.txt"),
    "sem_seg: empty classes": (
        after(write_sem, SEM_SPEC, lambda root: (root / "sem/names.txt").write_text("\n")),
        r"names\.txt is empty, but one class name a line",
    ),
    "sem_seg: a gap in the classes": (
        after(write_sem, SEM_SPEC, lambda root: (root / "sem/names.txt").write_text("a\n\nb\n")),
        "name 2 of 3 is empty",
    ),
    "sem_seg: a class twice": (after(write_sem, SEM_SPEC, nothing, classes=("a", "b", "a")), "CLASSES has 'a' 2 times"),
    "sem_seg: binary classes": (
        after(write_sem, SEM_SPEC, nothing, classes="sem/images/a.jpg"),
        r"a\.jpg cannot be read as UTF-8 text",
    ),
    "sem_seg: ignored value": (after(write_sem, SEM_SPEC, nothing, ignore_value=-1), "IGNORE_VALUE is -1, but"),
    "sem_seg: label without image": (
        after(write_sem, SEM_SPEC, lambda root: (root / "sem/images/b.jpg").rename(root / "sem/images/d.jpg")),
        r"b\.png has no image, but one named b is expected .*\. If the names differ in their ends, set IMAGE_SU",
    ),
    "sem_seg: no labels": (
        after(write_sem, SEM_SPEC, lambda root: (root / "none").mkdir(), labels="none"),
        "none holds no label PNG",
    ),
    "sem_seg: ambiguous image": (
        after(write_sem, SEM_SPEC, lambda root: save_image(root / "sem/images/a.png")),
        r"a\.png and a\.jpg differ in their suffix alone",
    ),
    "folder: missing": (after(write_folder, FOLDER_SPEC, nothing, images="folder/val"), "folder/val is nothing"),
    "folder: of splits": (
        after(write_folder, FOLDER_SPEC, nothing, images="folder"),
        "folder holds train, but one folder per class is expected, not per split",
    ),
    "folder: no classes": (
        after(write_folder, FOLDER_SPEC, nothing, images="folder/train/dog"),
        "dog holds no folder, but one folder per class",
    ),
    "folder: unlisted class": (
        after(write_folder, FOLDER_SPEC, nothing, classes=("cats", "dog")),
        "'cat' is not in CLASSES. Did you mean 'cats'",
    ),
    "folder: empty class": (
        after(write_folder, FOLDER_SPEC, lambda root: (root / "folder/train/ant").mkdir()),
        "ant holds no image; remove it, or list all classes in CLASSES",
    ),
    "folder: no image at all": (
        after(write_folder, FOLDER_SPEC, lambda root: (root / "empty/ant").mkdir(parents=True), images="empty"),
        "empty holds no image; known suffixes: .jpg",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data_set(tmp_path: Path, make: Callable[[Path], DatasetSpec], message: str) -> None:
    spec = make(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        read(spec, tmp_path)
    assert all(f"data set {spec.name!r}: " in problem for problem in error.value.problems)


JUNK = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=2))
JUNK = st.recursive(JUNK, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_coco_json_with_junk_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever passes the checks, Detectron2 can read."""
    root = coco_json()
    node: Any = root
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JUNK)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        write_coco(Path(folder), root)
        records = read(COCO_SPEC, Path(folder))
        known = range(len(MetadataCatalog.get(COCO_SPEC.name).thing_classes))
        assert all(item["category_id"] in known for record in records for item in record["annotations"])


def test_many_problems_of_one_kind_are_shortened(tmp_path: Path) -> None:
    data = coco_json()
    data["annotations"] = [{**data["annotations"][0], "id": number, "category_id": 99} for number in range(42)]
    write_coco(tmp_path, data)
    with pytest.raises(ConfigError) as error:
        register_datasets([COCO_SPEC], tmp_path)
    assert len(error.value.problems) == 6
    assert error.value.problems[-1].endswith("… and 37 more annotations of unknown categories.")


def test_problems_of_several_annotation_files_come_at_once(tmp_path: Path) -> None:
    write_voc(tmp_path, ("a", "b", "c"))
    (tmp_path / "voc/Annotations/a.xml").write_text("<annotation>")
    write_xml(tmp_path, "c", OBJECT.format("fox", 1, 1, 2, 2))
    with pytest.raises(ConfigError) as error:
        read(changed(VOC_SPEC, classes=("cat", "dog")), tmp_path)
    first, second = error.value.problems
    assert "a.xml is not valid XML" in first
    assert "c.xml: object 1 is 'fox'" in second
