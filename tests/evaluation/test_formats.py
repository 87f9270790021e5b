"""The evaluators of data sets that are registered from a record, from their files to a number."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from xlearner_d2.data.builtin import register_datasets
from xlearner_d2.evaluation import build_evaluator, main_metric
from xlearner_d2.evaluation.trivial import trivial_metrics
from xlearner_d2.specs import DatasetSpec

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZE = 64
VOC = DatasetSpec(name="x_eval_voc", format="voc", root="voc")
LVIS = DatasetSpec(name="x_eval_lvis", format="lvis", images="pics", annotations="lvis.json")
OBJECT = (
    "<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
#: class, difficult, corners
Truth = tuple[str, int, tuple[int, int, int, int]]


def write_voc(root: Path, images: Mapping[str, list[Truth]]) -> None:
    (root / "voc").mkdir(parents=True, exist_ok=True)
    for name, truths in images.items():
        Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(root / "voc" / f"{name}.png")
        objects = "".join(OBJECT.format(label, hard, *box) for label, hard, box in truths)
        size = f"<size><width>{SIZE}</width><height>{SIZE}</height></size>"
        (root / "voc" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def perfect(record: dict[str, Any], *, easy_alone: bool = False) -> Instances:
    """What the record says, as a prediction."""
    items = [item for item in record["annotations"] if not (easy_alone and item.get("iscrowd"))]
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    classes = torch.tensor([item["category_id"] for item in items], dtype=torch.int64)
    return Instances(
        (SIZE, SIZE),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.linspace(1, 0.5, len(items)),
        pred_classes=classes,
    )


def with_box(instances: Instances, label: int, box: tuple[float, ...], score: float = 2.0) -> Instances:
    more = Instances(
        (SIZE, SIZE),
        pred_boxes=Boxes(torch.tensor([box])),
        scores=torch.tensor([score]),
        pred_classes=torch.tensor([label]),
    )
    return Instances.cat([instances, more])


def evaluate(spec: DatasetSpec, found: list[Instances], output_dir: str | None = None) -> dict[str, float]:
    evaluator = build_evaluator(spec.name, output_dir=output_dir)
    evaluator.reset()
    for record, instances in zip(DatasetCatalog.get(spec.name), found, strict=True):
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


IMAGES: dict[str, list[Truth]] = {
    "a": [("cat", 0, (5, 5, 30, 30)), ("dog", 0, (20, 20, 60, 50))],
    "b": [("cat", 0, (10, 1, 20, 20)), ("dog", 1, (30, 30, 50, 50))],
}


def register_voc(root: Path, evaluation: str, images: Mapping[str, list[Truth]] = IMAGES) -> DatasetSpec:
    write_voc(root, images)
    spec = DatasetSpec(**{**vars(VOC), "evaluation": evaluation})
    register_datasets([spec], root)
    return spec


@pytest.mark.parametrize("evaluation", ["voc", "coco"])
@pytest.mark.parametrize("write", [True, False])
def test_voc_beside_images_by_either_evaluation(evaluation: str, write: bool, tmp_path: Path) -> None:
    spec = register_voc(tmp_path, evaluation)
    records = DatasetCatalog.get(spec.name)
    folder = str(tmp_path / "out") if write else None
    results = evaluate(spec, [perfect(record) for record in records], folder)
    assert main_metric(results) == pytest.approx({"bbox/AP": 100})
    assert trivial_metrics(spec.name, train_names=[spec.name]) == {"bbox/AP": 0}
    moved = [with_box(perfect(record), 0, (50, 50, 60, 60)) for record in records]
    assert 0 < main_metric(evaluate(spec, moved, folder))["bbox/AP"] < 100


@pytest.mark.parametrize("evaluation", ["voc", "coco"])
def test_difficult_objects_need_not_be_found_and_may_be(evaluation: str, tmp_path: Path) -> None:
    spec = register_voc(tmp_path, evaluation)
    register_voc(tmp_path, "coco")  # its records say which ones are difficult
    easy = [perfect(record, easy_alone=True) for record in DatasetCatalog.get(spec.name)]
    assert sum(map(len, easy)) == 3
    register_voc(tmp_path, evaluation)
    assert main_metric(evaluate(spec, easy)) == pytest.approx({"bbox/AP": 100})


def test_registering_again_evaluates_the_new_files(tmp_path: Path) -> None:
    spec = register_voc(tmp_path / "one", "coco")
    old = [perfect(record) for record in DatasetCatalog.get(spec.name)]
    assert main_metric(evaluate(spec, old))["bbox/AP"] == pytest.approx(100)
    other = {name: [("cat", 0, (40, 40, 60, 60))] for name in IMAGES}
    register_voc(tmp_path / "two", "coco", {**other, "b": [("dog", 0, (1, 1, 9, 9))]})
    assert main_metric(evaluate(spec, old))["bbox/AP"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("images", "wrong"),
    [({"a b": IMAGES["a"]}, "'a b'"), ({"a": [("cat/dog", 0, (1, 1, 9, 9))]}, "'cat/dog'")],
)
def test_names_that_only_the_other_evaluation_takes(
    images: Mapping[str, list[Truth]], wrong: str, tmp_path: Path
) -> None:
    spec = register_voc(tmp_path, "voc", images)
    with pytest.raises(ValueError, match=rf"has {wrong}: .* Set EVALUATION: coco"):
        build_evaluator(spec.name, output_dir=None)
    register_voc(tmp_path, "coco", images)
    assert main_metric(evaluate(spec, [perfect(r) for r in DatasetCatalog.get(spec.name)]))["bbox/AP"] > 99.9


# --- LVIS -----------------------------------------------------------------------------------------------------------


def write_lvis(root: Path) -> None:
    """Two images: cats (rare) are in the first, dogs (frequent) in both; eels were looked for in the second alone."""
    boxes = [(1, 4, [4, 4, 20, 20]), (1, 9, [30, 30, 20, 20]), (2, 9, [10, 10, 30, 30])]
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
        for number, (image, label, box) in enumerate(boxes, 1)
    ]
    for item in annotations:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    address = "http://images.cocodataset.org/train2017/{:012d}.jpg"
    images = [{"id": number, "width": SIZE, "height": SIZE, "coco_url": address.format(number)} for number in (1, 2)]
    images[0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": [4]}
    images[1] |= {"neg_category_ids": [15], "not_exhaustive_category_ids": []}
    names = {9: ("dog", "f"), 4: ("cat", "r"), 15: ("eel", "c")}
    categories = [{"id": key, "name": name, "frequency": often} for key, (name, often) in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "pics/train2017").mkdir(parents=True)
    (root / "lvis.json").write_text(json.dumps(content))


CAT, DOG, EEL = range(3)
ELSEWHERE = (55.0, 55.0, 62.0, 62.0)


@pytest.mark.parametrize(
    ("image", "label", "harmless"),
    [
        (0, EEL, True),  # nobody looked for eels there
        (0, CAT, True),  # not every cat there is annotated
        (1, CAT, True),
        (0, DOG, False),
        (1, DOG, False),
    ],
)
def test_lvis_counts_what_was_looked_for(image: int, label: int, harmless: bool, tmp_path: Path) -> None:
    write_lvis(tmp_path)
    register_datasets([LVIS], tmp_path)
    assert MetadataCatalog.get(LVIS.name).thing_classes == ["cat", "dog", "eel"]
    found = [perfect(record) for record in DatasetCatalog.get(LVIS.name)]
    results = evaluate(LVIS, found, str(tmp_path / "out"))
    assert main_metric(results) == pytest.approx({"bbox/AP": 100})
    assert (results["bbox"]["APr"], results["bbox"]["APf"]) == pytest.approx((100, 100))
    found[image] = with_box(found[image], label, ELSEWHERE)
    assert (main_metric(evaluate(LVIS, found))["bbox/AP"] > 99) == harmless


def test_lvis_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lvis(tmp_path)
    register_datasets([LVIS], tmp_path)
    capsys.readouterr()
    evaluate(LVIS, [perfect(record) for record in DatasetCatalog.get(LVIS.name)])
    assert capsys.readouterr().out == ""
    assert trivial_metrics(LVIS.name, train_names=[LVIS.name]) == {"bbox/AP": 0, "segm/AP": 0}


def test_lvis_finding_nothing_is_ap_zero(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    register_datasets([LVIS], tmp_path)
    found = [perfect(record)[:0] for record in DatasetCatalog.get(LVIS.name)]
    assert main_metric(evaluate(LVIS, found)) == {"bbox/AP": 0}
    for instances in found:
        instances.pred_masks = torch.zeros(0, SIZE, SIZE, dtype=torch.bool)
    assert main_metric(evaluate(LVIS, found)) == {"bbox/AP": 0, "segm/AP": 0}


def test_lvis_without_what_evaluates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lvis(tmp_path)
    register_datasets([LVIS], tmp_path)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ValueError, match="LVIS data needs the package hotcoco: pip install hotcoco"):
        build_evaluator(LVIS.name, output_dir=None)
