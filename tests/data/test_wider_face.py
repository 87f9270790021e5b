"""WIDER FACE: boxes, crowds and sizes as its table has them, and clear about a bad one."""

from pathlib import Path

import pytest
import torch
from builtin_data import read
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from public_data import FACES, lines, write_faces
from torchvision.datasets import WIDERFace

from xlearner_d2.data.check import check_records
from xlearner_d2.evaluation.build import build_evaluator
from xlearner_d2.specs import ConfigError, DatasetSpec

VAL = DatasetSpec(name="x_faces", format="torchvision", dataset="WIDERFace", split="val")
IMAGES = "widerface/WIDER_val/images"
TABLE = "widerface/wider_face_split/wider_face_val_bbx_gt.txt"


def test_faces(tmp_path: Path) -> None:
    """Boxes are clipped to 40 x 30 pixels; empty ones are left out, and invalid ones are crowds."""
    write_faces(tmp_path)
    records = read(VAL, tmp_path)
    metadata = MetadataCatalog.get(VAL.name)
    assert metadata.thing_classes == ["face"]
    assert [record["file_name"] for record in records] == [f"{tmp_path}/{IMAGES}/{file}" for file in FACES]
    found = [[(item["bbox"], item["iscrowd"]) for item in record["annotations"]] for record in records]
    assert found == [
        [([1, 2, 3, 4], 0), ([30, 20, 10, 10], 0), ([5, 5, 2, 2], 1)],
        [],
        [([0, 3, 8, 6], 0)],
    ]
    assert {item["category_id"] for record in records for item in record["annotations"]} == {0}
    assert check_records(VAL.name, records, metadata, max_images=-1) == []


def test_faces_equal_torchvision(tmp_path: Path) -> None:
    """But for the boxes that are clipped or left out here."""
    write_faces(tmp_path)
    (tmp_path / "widerface/WIDER_test").mkdir()
    for record, info in zip(read(VAL, tmp_path), WIDERFace(tmp_path, split="val").img_info, strict=True):
        assert record["file_name"] == info["img_path"]
        boxes = [item["bbox"] for item in record["annotations"]]
        inside = [[x, y, w, h] for x, y, w, h in info["annotations"]["bbox"].tolist() if x >= 0 < w and x + w <= 40]
        assert [box for box in boxes if box in inside] == inside


def test_faces_are_converted_once(tmp_path: Path) -> None:
    write_faces(tmp_path)
    records = read(VAL, tmp_path)
    (tmp_path / TABLE).unlink()
    assert read(VAL, tmp_path) == records


@pytest.mark.parametrize("also_invalid", [True, False])
def test_faces_are_evaluated(also_invalid: bool, tmp_path: Path) -> None:
    """Perfect boxes have AP 100, whether or not those of invalid faces are among them."""
    write_faces(tmp_path)
    records = read(VAL, tmp_path)
    evaluator = build_evaluator(VAL.name, output_dir=None)
    evaluator.reset()
    for record in records:
        wanted = [item["bbox"] for item in record["annotations"] if also_invalid or not item["iscrowd"]]
        boxes = BoxMode.convert(torch.tensor(wanted).reshape(-1, 4).float(), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        found = Instances((30, 40), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.jpg"], "after line 1: a number was expected"),
        (["a.jpg", "one"], "after line 1: a number was expected"),
        (["a.jpg", "1", "1 2 3 x 0 0 0 0 0 0"], "after line 1: a number was expected"),
        (["a.jpg", "1", "1 2 3 4"], "line 1: after 'a.jpg' and the number of faces, 1 lines of 10 numbers"),
        (["a.jpg", "2", "1 2 3 4 0 0 0 0 0 0"], "2 lines of 10 numbers are expected"),
        (["b.jpg", "0", "0 0 0 0 0 0 0 0 0 0"], "there is no image .*WIDER_val/images/b.jpg"),
    ],
)
def test_a_bad_table_of_faces(rows: list[str], message: str, tmp_path: Path) -> None:
    write_faces(tmp_path)
    lines(tmp_path / TABLE, rows)
    with pytest.raises(ConfigError, match=message):
        read(VAL, tmp_path)
    assert not (tmp_path / "xlearner_cache/WIDERFace/val").exists()
