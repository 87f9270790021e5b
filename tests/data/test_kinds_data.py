"""Mappers, checks and proposals of the kinds that Detectron2's own mapper does not know."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.data.check import check_records
from xlearner_d2.data.depth import DepthMapper, read_depth
from xlearner_d2.data.panoptic import PanopticMapper, _ByRecord
from xlearner_d2.data.proposals import with_proposals
from xlearner_d2.extensions import id2rgb, provide_panopticapi, rgb2id
from xlearner_d2.labels import PanopticLabels
from xlearner_d2.specs import ConfigError, DatasetSpec, parse_datasets

HEIGHT, WIDTH = 12, 20


@given(arrays(np.int64, (3, 4), elements=st.integers(0, 256**3 - 1)))
def test_colours_and_ids_lead_back(ids: np.ndarray) -> None:
    assert (rgb2id(id2rgb(ids)) == ids).all()


def test_detectron2_finds_the_functions_of_panopticapi() -> None:
    provide_panopticapi()
    utils = sys.modules["panopticapi.utils"]
    assert utils.rgb2id(np.array([[1, 2, 3]], dtype=np.uint8)).tolist() == [1 + 2 * 256 + 3 * 256**2]


@pytest.fixture
def panoptic(tmp_path: Path) -> dict[str, Any]:
    """A thing (number 2) in front of two stuff classes (0 and 3), a crowd (1), and a pixel without a segment."""
    ids = np.full((HEIGHT, WIDTH), 500)
    ids[:, 10:] = 9
    ids[2:6, 3:8] = 70000
    ids[8:, :4] = 33
    ids[0, 0] = 0
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(id2rgb(ids)).save(tmp_path / "segments.png")
    infos = [(500, 0, False, 0), (9, 3, False, 0), (70000, 2, True, 0), (33, 1, True, 1)]
    keys = ("id", "category_id", "isthing", "iscrowd")
    return {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "segments.png"),
        "segments_info": [dict(zip(keys, info, strict=True)) for info in infos],
    }


@pytest.mark.parametrize("flip", [False, True])
def test_panoptic_png_becomes_instances_and_semantic_labels(panoptic: dict[str, Any], flip: bool) -> None:
    mapper = PanopticMapper(
        augmentations=[T.RandomFlip(prob=float(flip))],
        image_format="BGR",
        labels=PanopticLabels(things=(1, 2), stuff=(0, 3)),
    )
    mapped = mapper(panoptic)
    wanted = np.full((HEIGHT, WIDTH), 1)
    wanted[:, 10:] = 2
    wanted[2:6, 3:8] = wanted[8:, :4] = 0
    wanted[0, 0] = 255
    assert torch.equal(mapped["sem_seg"], torch.as_tensor(wanted[:, ::-1].copy() if flip else wanted))
    found = mapped["instances"]
    assert found.gt_classes.tolist() == [1]
    assert found.gt_boxes.tensor.tolist() == [[12, 2, 17, 6] if flip else [3, 2, 8, 6]]
    assert int(found.gt_masks.tensor.sum()) == 20
    assert "segments_info" not in mapped


def test_records_like_those_of_cityscapes(panoptic: dict[str, Any]) -> None:
    """Segments without ``isthing``, and semantic labels of other numbers beside them."""
    labels = PanopticLabels(things=(1, 2), stuff=(0, 3))
    mapper = PanopticMapper(augmentations=[], image_format="RGB", labels=labels)
    wanted = mapper(panoptic)
    for segment in panoptic["segments_info"]:
        del segment["isthing"]
    panoptic["sem_seg_file_name"] = "other numbers.png"
    found = _ByRecord(separated=lambda record: record, panoptic=mapper)(panoptic)
    assert torch.equal(found["sem_seg"], wanted["sem_seg"])
    assert torch.equal(found["instances"].gt_classes, wanted["instances"].gt_classes)
    assert "sem_seg_file_name" not in found


def test_panoptic_image_without_things(panoptic: dict[str, Any]) -> None:
    panoptic["segments_info"] = panoptic["segments_info"][:2]
    mapper = PanopticMapper(augmentations=[], image_format="RGB", labels=PanopticLabels(things=(1, 2), stuff=(0, 3)))
    assert len(mapper(panoptic)["instances"]) == 0


def check(record: dict[str, Any], **metadata: Any) -> list[str]:
    MetadataCatalog.pop("checked", None)
    return check_records("checked", [record], MetadataCatalog.get("checked").set(**metadata), max_images=-1)


FOUR = {"thing_classes": list("abcd"), "stuff_classes": list("abcd")}


def unlisted(record: dict[str, Any]) -> None:
    record["segments_info"].pop()


def unseen(record: dict[str, Any]) -> None:
    record["segments_info"].append({"id": 12, "category_id": 1, "isthing": True})


def twice(record: dict[str, Any]) -> None:
    record["segments_info"].append(record["segments_info"][0])


def unknown(record: dict[str, Any]) -> None:
    record["segments_info"][0]["category_id"] = 4


def small(record: dict[str, Any]) -> None:
    Image.fromarray(id2rgb(np.array([[500, 9, 70000, 33]]))).save(record["pan_seg_file_name"])


def broken(record: dict[str, Any]) -> None:
    Path(record["pan_seg_file_name"]).write_bytes(b"no image")


def gone(record: dict[str, Any]) -> None:
    Path(record["pan_seg_file_name"]).unlink()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (unlisted, "has segments .33. that are not listed"),
        (unseen, "lacks the listed .12."),
        (twice, "a segment that is listed twice"),
        (unknown, "class index 4, but 0 to 3 is expected"),
        (small, "segments.png is 4 x 1 pixels, but its image is 20 x 12"),
        (broken, "segments.png cannot be decoded"),
        (gone, "segments.png does not exist"),
    ],
)
def test_wrong_panoptic_record(panoptic: dict[str, Any], spoil: Callable[[Any], None], match: str) -> None:
    assert check(panoptic, **FOUR) == []
    spoil(panoptic)
    assert [match in line.replace("[", ".").replace("]", ".") for line in check(panoptic, **FOUR)] == [True]


def test_wrong_label_among_several(panoptic: dict[str, Any]) -> None:
    record = {"file_name": panoptic["file_name"], "category_ids": [0, 2]}
    assert check(record, classes=list("abc")) == []
    assert "class index 2, but 0 to 1 is expected" in check(record, classes=list("ab"))[0]


@pytest.fixture
def depth(tmp_path: Path) -> dict[str, Any]:
    """Millimetres in a 16-bit PNG, from 1 m at the left on; the first row is not known."""
    values = np.tile(np.arange(1000, 1000 + 100 * WIDTH, 100, dtype=np.uint16), (HEIGHT, 1))
    values[0] = 0
    Image.fromarray(values).save(tmp_path / "depth.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "image.png")
    files = {"file_name": str(tmp_path / "image.png"), "depth_file_name": str(tmp_path / "depth.png")}
    return {**files, "depth_scale": 1000.0}


def test_depth_is_in_metres_in_both_formats(depth: dict[str, Any], tmp_path: Path) -> None:
    found = read_depth(depth["depth_file_name"], scale=1000.0)
    assert found.dtype == np.float32
    assert found[1, :3].tolist() == pytest.approx([1.0, 1.1, 1.2])
    strange = found.copy()
    strange[0, :3] = [np.nan, -1, np.inf]
    np.save(tmp_path / "depth.npy", strange)
    assert (read_depth(str(tmp_path / "depth.npy"), scale=1.0) == found).all()


def test_depth_is_moved_with_its_image_and_keeps_its_values(depth: dict[str, Any]) -> None:
    wide = [T.ResizeTransform(HEIGHT, WIDTH, 2 * HEIGHT, 2 * WIDTH), T.HFlipTransform(2 * WIDTH)]
    mapped = DepthMapper(augmentations=wide, image_format="RGB")(depth)
    truth = read_depth(depth["depth_file_name"], scale=1000.0)
    assert mapped["image"].shape == (3, 2 * HEIGHT, 2 * WIDTH)
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
    assert np.array_equal(mapped["depth"].numpy(), truth.repeat(2, axis=0).repeat(2, axis=1)[:, ::-1])


def write(record: dict[str, Any], values: np.ndarray, suffix: str = ".npy") -> None:
    record["depth_file_name"] = str(Path(record["depth_file_name"]).with_suffix(suffix))
    np.save(record["depth_file_name"], values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.ones((HEIGHT, WIDTH, 3)), "shape (12, 20, 3) of float64, but one number per pixel"),
        (np.full((HEIGHT, WIDTH), "x"), "but one number per pixel"),
        (np.ones((HEIGHT, 3)), "is 3 x 12 pixels, but its image is 20 x 12"),
        (np.zeros((HEIGHT, WIDTH)), "no positive value, but some known depth is expected"),
    ],
)
def test_wrong_depth_map(depth: dict[str, Any], values: np.ndarray, match: str) -> None:
    assert check(depth) == []
    write(depth, values)
    assert [match in line for line in check(depth)] == [True]


@pytest.mark.parametrize(("metres", "told"), [(2.0, False), (0.002, True), (2000.0, True), (0.1, False)])
def test_depths_of_another_scale(
    depth: dict[str, Any], caplog: pytest.LogCaptureFixture, metres: float, told: bool
) -> None:
    write(depth, np.full((HEIGHT, WIDTH), 1000 * metres))
    assert check(depth) == []
    assert ("Is SCALE right?" in caplog.text) == told


def test_damaged_depth_map(depth: dict[str, Any]) -> None:
    Path(depth["depth_file_name"]).write_bytes(b"no image")
    assert "depth.png cannot be read" in check(depth)[0]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("images/a.jpg", "images/b.jpg", "depth/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / name)
    np.save(tmp_path / "depth/b.npy", np.ones((4, 4)))
    return tmp_path


def records(root: Path, **keys: Any) -> list[dict[str, Any]]:
    spec = DatasetSpec(name="folders_depth", format="depth", images="images", labels="depth", **keys)
    register_datasets([spec], root)
    return DatasetCatalog.get("folders_depth")


def test_depth_folders_become_records(folders: Path) -> None:
    found = records(folders, scale=256.0)
    assert [Path(record["depth_file_name"]).name for record in found] == ["a.png", "b.npy"]
    assert {record["depth_scale"] for record in found} == {256.0}


def test_depth_map_without_image(folders: Path) -> None:
    (folders / "images/b.jpg").unlink()
    with pytest.raises(ConfigError, match=r"b\.npy has no image, but one named b"):
        records(folders)


def test_two_depth_maps_of_one_image(folders: Path) -> None:
    np.save(folders / "depth/a.npy", np.ones((4, 4)))
    with pytest.raises(ConfigError, match=r"are of one image"):
        records(folders)


def test_no_depth_map(folders: Path) -> None:
    for path in (folders / "depth").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds no depth map, but \.png or \.npy files"):
        records(folders)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_scale(folders: Path, scale: float) -> None:
    with pytest.raises(ConfigError, match=r"SCALE is .*, but what a metre is"):
        records(folders, scale=scale)


def test_scale_has_no_meaning_elsewhere() -> None:
    problems: list[str] = []
    parse_datasets({"x": {"FORMAT": "image_folder", "IMAGES": "x", "SCALE": 2}}, problems)
    assert problems == ["XLEARNER.DATASETS.x.SCALE has no meaning for FORMAT 'image_folder'."]


def proposal_file(path: Path, **content: Any) -> str:
    path.write_bytes(pickle.dumps(content))
    return str(path)


BOXES, SCORES = np.array([[0, 0, 5, 5], [1, 1, 4, 4.0]]), np.array([0.5, 2.0])


def test_proposals_are_those_of_the_image_best_first(tmp_path: Path) -> None:
    content = {"ids": [8, 7], "boxes": [BOXES + 3, BOXES], "objectness_logits": [SCORES, SCORES]}
    own = [{"image_id": 7}]
    (found,) = with_proposals("a", own, proposal_file(tmp_path / "p.pkl", **content))
    assert found["proposal_boxes"].tolist() == BOXES[::-1].tolist()
    assert own == [{"image_id": 7}]  # another source may want the records without


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ids": [9]}, "lacks the image or key '7'"),
        ({"boxes": [BOXES[:, :3]]}, r"boxes of shape \(2, 3\) and 2 scores for image 7"),
        ({"boxes": [BOXES * np.nan]}, "but finite boxes"),
    ],
)
def test_wrong_proposals(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    file = proposal_file(tmp_path / "p.pkl", **{"ids": [7], "boxes": [BOXES], "objectness_logits": [SCORES], **change})
    with pytest.raises(ConfigError, match=match):
        with_proposals("a", [{"image_id": 7}], file)


def test_proposal_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_text("boxes")
    with pytest.raises(ConfigError, match=r"data set 'a': the proposal file .*p\.pkl cannot be read"):
        with_proposals("a", [{"image_id": 7}], str(tmp_path / "p.pkl"))
    with pytest.raises(ConfigError, match=r"cannot be read.*FileNotFoundError"):
        with_proposals("a", [{"image_id": 7}], str(tmp_path / "q.pkl"))


def test_proposals_need_image_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives boxes by image_id, but not all records have one"):
        with_proposals("a", [{}], str(tmp_path / "p.pkl"))
