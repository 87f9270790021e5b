"""Layouts in which public sets come: folders of cities, suffixes, palettes, labels from 1 on, and VOC's own folders."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_data import OBJECT, SEM_SPEC, VOC_SPEC, changed, read, save_image, write_voc, write_xml
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.check import check_records
from xlearner_d2.evaluation.build import read_labels
from xlearner_d2.specs import ConfigError, DatasetSpec

CITY_SPEC = DatasetSpec(
    name="x_city",
    format="sem_seg",
    images="leftImg8bit/val",
    labels="gtFine/val",
    classes=("road", "sky"),
    image_suffix="_leftImg8bit",
    label_suffix="_gtFine_labelTrainIds.png",
)
FRAMES = ("aachen/aachen_000000_000019", "ulm/ulm_000001_000019")


def save_label(path: Path, labels: Any, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, np.uint8))
    if palette:
        image.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    image.save(path)


def write_cityscapes(root: Path) -> None:
    for frame in FRAMES:
        save_image(root / f"leftImg8bit/val/{frame}_leftImg8bit.png")
        for kind in ("color", "instanceIds", "labelIds", "labelTrainIds"):
            save_label(root / f"gtFine/val/{frame}_gtFine_{kind}.png", np.eye(8, 12))


def test_cityscapes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    records = read(CITY_SPEC, tmp_path)
    assert [record["file_name"] for record in records] == [
        f"{tmp_path}/leftImg8bit/val/{frame}_leftImg8bit.png" for frame in FRAMES
    ]
    assert [record["sem_seg_file_name"] for record in records] == [
        f"{tmp_path}/gtFine/val/{frame}_gtFine_labelTrainIds.png" for frame in FRAMES
    ]
    assert check_records("x_city", records, MetadataCatalog.get("x_city"), max_images=-1) == []


@pytest.mark.parametrize(
    "text",
    [
        "{0}\n{1}\n",
        "leftImg8bit/val/{0}_leftImg8bit.png gtFine/val/{0}_gtFine_labelTrainIds.png\n{1}_leftImg8bit\n",
    ],
)
def test_cityscapes_by_a_list(text: str, tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    (tmp_path / "list.txt").write_text(text.format(*reversed(FRAMES)))
    records = read(changed(CITY_SPEC, list="list.txt"), tmp_path)
    assert [Path(record["file_name"]).parent.name for record in records] == ["ulm", "aachen"]
    assert [Path(record["sem_seg_file_name"]).parent.name for record in records] == ["ulm", "aachen"]


def test_a_list_of_pairs_needs_no_suffixes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    (tmp_path / "list.txt").write_text(f"{FRAMES[0]}_leftImg8bit.png {FRAMES[0]}_gtFine_labelIds.png\n")
    (record,) = read(changed(CITY_SPEC, list="list.txt", image_suffix="", label_suffix=""), tmp_path)
    assert record["sem_seg_file_name"].endswith("aachen_000000_000019_gtFine_labelIds.png")


def test_a_name_that_is_in_two_folders_needs_its_folder(tmp_path: Path) -> None:
    for city in ("a", "b"):
        save_image(tmp_path / f"sem/images/{city}/1.jpg")
        save_label(tmp_path / f"sem/labels/{city}/1.png", np.zeros((8, 12)))
    spec = changed(SEM_SPEC, classes=("x",), list="list.txt")
    (tmp_path / "list.txt").write_text("b/1\n")
    (record,) = read(spec, tmp_path)
    assert record["file_name"].endswith("b/1.jpg")
    (tmp_path / "list.txt").write_text("1\n")
    with pytest.raises(ConfigError, match=r"LIST has '1', which may be .*a/1\.jpg or .*b/1\.jpg: give its path below"):
        read(spec, tmp_path)


def test_a_list_takes_no_file_of_another_folder(tmp_path: Path) -> None:
    """Frames have the same names in each video."""
    for video in ("a", "b"):
        save_image(tmp_path / f"sem/images/{video}/1.jpg")
    save_label(tmp_path / "sem/labels/a/1.png", np.zeros((8, 12)))
    (tmp_path / "list.txt").write_text("b/1\n")
    with pytest.raises(ConfigError, match=r"LIST has 'b/1', but .*sem/labels has no label PNG of that name"):
        read(changed(SEM_SPEC, classes=("x",), list="list.txt"), tmp_path)


@pytest.mark.parametrize("names", ["a/1\nb/1\n", "b/1\n1\n"])
def test_a_label_of_one_image_is_not_taken_for_that_of_another(tmp_path: Path, names: str) -> None:
    for video in ("a", "b"):
        save_image(tmp_path / f"sem/images/{video}/1.jpg")
    save_label(tmp_path / "sem/labels/1.png", np.zeros((8, 12)))
    (tmp_path / "list.txt").write_text(names)
    with pytest.raises(ConfigError, match=r"sem/labels has only .*1\.png for both|which may be"):
        read(changed(SEM_SPEC, classes=("x",), list="list.txt"), tmp_path)


def test_images_and_labels_in_one_folder(tmp_path: Path) -> None:
    save_image(tmp_path / "all/1.jpg")
    save_label(tmp_path / "all/1.png", np.zeros((8, 12)))
    spec = changed(SEM_SPEC, images="all", labels="all", classes=("x",), image_suffix=".jpg")
    (record,) = read(spec, tmp_path)
    assert (record["file_name"], record["sem_seg_file_name"]) == (f"{tmp_path}/all/1.jpg", f"{tmp_path}/all/1.png")
    with pytest.raises(ConfigError, match="differ in their suffix alone"):
        read(changed(spec, image_suffix=""), tmp_path)


def map_label(record: dict[str, Any]) -> list[list[int]]:
    """As Detectron2's own mapper gives it to a model."""
    mapper = DatasetMapper(get_cfg(), is_train=True, augmentations=[], image_format="BGR")
    return mapper(record)["sem_seg"].tolist()


@pytest.mark.parametrize("palette", [False, True], ids=["L", "P"])
@pytest.mark.parametrize("reduce", [False, True], ids=["as it is", "reduced"])
def test_labels_with_a_palette_and_from_1_on(palette: bool, reduce: bool, tmp_path: Path) -> None:
    save_image(tmp_path / "sem/images/a.jpg", width=3, height=1)
    labels = [[0, 1, 2]] if reduce else [[255, 0, 1]]
    save_label(tmp_path / "sem/labels/a.png", labels, palette=palette)
    (record,) = read(changed(SEM_SPEC, classes=("road", "sky"), reduce_zero_label=reduce), tmp_path)
    assert map_label(record) == [[255, 0, 1]]
    assert read_labels(record["sem_seg_file_name"], num_classes=2, ignore_label=255).tolist() == [[255, 0, 1]]
    assert check_records("x_sem", [record], MetadataCatalog.get("x_sem"), max_images=-1) == []
    plain = record["sem_seg_file_name"] == f"{tmp_path}/sem/labels/a.png"
    assert plain == (not palette and not reduce)  # as Detectron2's own records, where that will do


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        ([[0, 1, 2]], {}, r"a\.png has the label 2 \(1 pixels\), but 0 to 1, or 255 to ignore, is expected"),
        ([[0, 1, 2]], {}, r"label 0 is none of them, set REDUCE_ZERO_LABEL: True\.$"),
        ([[0, 1, 3]], {"reduce_zero_label": True}, r"a\.png has the label 2 \(1 pixels\)"),
        ([[0, 1]], {}, r"a\.png is 2 x 1 pixels, but its image is 3 x 1"),
    ],
)
def test_labels_of_no_class(labels: Any, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_image(tmp_path / "sem/images/a.jpg", width=3, height=1)
    save_label(tmp_path / "sem/labels/a.png", labels, palette=True)
    records = read(changed(SEM_SPEC, classes=("road", "sky"), **change), tmp_path)
    (problem,) = check_records("x_sem", records, MetadataCatalog.get("x_sem"), max_images=-1)
    with pytest.raises(ConfigError, match=message):
        raise ConfigError([problem])


def test_colours_instead_of_indices(tmp_path: Path) -> None:
    save_image(tmp_path / "sem/images/a.jpg")
    save_image(tmp_path / "sem/labels/a.png")
    records = read(changed(SEM_SPEC, classes=("road", "sky")), tmp_path)
    (problem,) = check_records("x_sem", records, MetadataCatalog.get("x_sem"), max_images=-1)
    assert "(mode RGB), but class indices in one channel or with a palette are expected" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_suffix": "_labels"}, r"gtFine/val holds no label PNG whose name ends in '_labels' \(LABEL_SUFFIX\)"),
        ({"image_suffix": "_left"}, r"leftImg8bit/val holds no image whose name ends in '_left' \(IMAGE_SUFFIX\)"),
        (
            {"image_suffix": ""},
            r"labelTrainIds\.png has no image, but one named aachen/aachen_000000_000019 is expected",
        ),
        ({"classes": ()}, "CLASSES is empty, but the names of the label values 0, 1, … are expected"),
    ],
)
def test_wrong_suffixes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read(changed(CITY_SPEC, **change), tmp_path)


# --- Pascal VOC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["VOC2007", "VOCdevkit/VOC2007"])
def test_voc_devkit_as_it_unpacks(below: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "kit" / below).parent.mkdir(parents=True)
    shutil.move(tmp_path / "voc", tmp_path / "kit" / below)
    records = read(changed(VOC_SPEC, root="kit", year=2007), tmp_path)
    assert records == load_voc_instances(f"{tmp_path}/kit/{below}", "train", ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"ROOT: .* holds VOC2007, but not VOC2012 \(YEAR is 2012\)"):
        read(changed(VOC_SPEC, root="kit", year=2012), tmp_path)


def write_flat(root: Path, names: tuple[str, ...] = ("a", "b")) -> None:
    """The devkit's images and XML files in one folder."""
    write_voc(root, names)
    for folder in ("JPEGImages", "Annotations"):
        for path in (root / "voc" / folder).iterdir():
            path.rename(root / "voc" / path.name)
        (root / "voc" / folder).rmdir()


def test_voc_with_images_beside_their_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_voc(tmp_path)
    expected = [
        {**record, "file_name": record["file_name"].replace("JPEGImages/", "")} for record in read(VOC_SPEC, tmp_path)
    ]
    write_flat(tmp_path)
    assert read(changed(VOC_SPEC, split=""), tmp_path) == expected
    assert not caplog.text
    save_image(tmp_path / "voc/c.jpg")
    assert read(changed(VOC_SPEC, split=""), tmp_path) == expected
    assert f"1 of 3 images in {tmp_path}/voc have no XML file beside them and are left out: c" in caplog.text


def test_voc_counted_from_0_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_voc(tmp_path)
    read(VOC_SPEC, tmp_path)
    assert not caplog.text
    write_xml(tmp_path, "b", OBJECT.format("dog", 0, 2, 11, 7))
    read(VOC_SPEC, tmp_path)
    assert "1 of 3 boxes begin before pixel 1, which is VOC's first. If the files count from 0" in caplog.text


def test_voc_with_a_folder_for_each_split(tmp_path: Path) -> None:
    write_flat(tmp_path)
    shutil.move(tmp_path / "voc", tmp_path / "train")
    write_voc(tmp_path)
    write_xml(tmp_path, "a", OBJECT.format("ant", 1, 1, 2, 2))
    shutil.move(tmp_path / "voc/Annotations", tmp_path / "valid")
    shutil.rmtree(tmp_path / "voc")
    records = read(changed(VOC_SPEC, root=".", split="train"), tmp_path)
    assert [record["image_id"] for record in records] == ["a", "b"]
    assert MetadataCatalog.get("x_voc").thing_classes == ["ant", "cat", "dog"]  # of both splits
    with pytest.raises(ConfigError, match=r"nor a folder val \(SPLIT\)\. Did you mean 'valid'\?"):
        read(changed(VOC_SPEC, root=".", split="val"), tmp_path)
    with pytest.raises(ConfigError, match=r"has no XML file, .* Splits in folders of their own need SPLIT"):
        read(changed(VOC_SPEC, root=".", split=""), tmp_path)


def test_voc_without_lists_is_all_of_it(tmp_path: Path) -> None:
    write_voc(tmp_path)
    with_list = read(VOC_SPEC, tmp_path)
    shutil.rmtree(tmp_path / "voc/ImageSets")
    assert read(changed(VOC_SPEC, split=""), tmp_path) == with_list


def test_voc_for_the_evaluation_of_coco(tmp_path: Path) -> None:
    write_voc(tmp_path)
    hard = OBJECT.replace("<difficult>0", "<difficult>1")
    write_xml(tmp_path, "b", OBJECT.format("dog", 1, 1, 5, 5) + hard.format("cat", 3, 3, 5, 5))
    records = read(changed(VOC_SPEC, evaluation="coco"), tmp_path)
    assert [record["image_id"] for record in records] == [1, 2]
    assert [item["iscrowd"] for record in records for item in record["annotations"]] == [0, 0, 0, 1]
    assert MetadataCatalog.get("x_voc").evaluator_type == "coco"
    with pytest.raises(ConfigError, match="EVALUATION is 'coca', but voc or coco is expected"):
        register_datasets([changed(VOC_SPEC, evaluation="coca")], tmp_path)
