"""Every kind of supervision through a whole run: checked, trained, evaluated, compared, drawn, squeezed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Project
from detectron2.data import DatasetCatalog, MetadataCatalog
from disk_data import SIZE
from kinds_data import register_panoptic, write_kinds

from xlearner_d2.data.proposals import with_proposals
from xlearner_d2.specs import ConfigError

NARROW = ["MODEL.FPN.OUT_CHANNELS", 32, "INPUT.MIN_SIZE_TRAIN", [SIZE], "INPUT.MIN_SIZE_TEST", SIZE]
ROI = [*NARROW, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
#: kind -> head, data set, options, and the metrics it is evaluated by
KINDS = {
    "labels": (
        "configs/heads/classifier.yaml",
        "k_boxes",
        ["MODEL.CLASSIFIER.MULTI_LABEL", True, "INPUT.CLASSIFICATION.SIZE", SIZE],
        {"multi_label/mAP"},
    ),
    "points": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "k_points",
        [*ROI, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16]],
        {"bbox/AP", "keypoints/AP"},
    ),
    "given": (
        "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
        "k_points",
        [*ROI, "DATASETS.PROPOSAL_FILES_TRAIN", ["proposals"], "DATASETS.PROPOSAL_FILES_TEST", ["proposals"]],
        {"bbox/AP"},
    ),
    "boxless": ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "k_points", NARROW, {"box_proposals/AR@1000"}),
    "everything": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "k_panoptic",
        [*ROI, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32],
        {"panoptic_seg/PQ"},
    ),
    "depths": (
        "configs/heads/depth_fpn.yaml",
        "k_depth",
        [*NARROW, "MODEL.DEPTH_HEAD.CONVS_DIM", 32],
        {"depth/delta1"},
    ),
}


def change(project: Project, kinds: dict[str, tuple]) -> Project:
    write_kinds(project.root / "data")
    register_panoptic("k_panoptic", project.root / "data")
    content = project.content["XLEARNER"]
    content["DATASETS"] = {
        "k_boxes": {"FORMAT": "coco", "IMAGES": "boxes", "ANNOTATIONS": "boxes.json"},
        "k_points": {"FORMAT": "coco", "IMAGES": "kinds", "ANNOTATIONS": "keypoints.json"},
        "k_depth": {"FORMAT": "depth", "IMAGES": "kinds", "LABELS": "depth"},
    }
    content["PROBES"], content["SQUEEZE"]["BN_RECALIBRATION_BATCHES"] = {}, 0
    project.content["SOLVER"]["CHECKPOINT_PERIOD"] = 2
    proposals = [str(project.root / "data/proposals.pkl")]
    content["SOURCES"] = {
        name: {
            "TASK": name if name in ("labels", "everything") else "rest",
            "CONFIG": head,
            "TRAIN": [data],
            "TEST": [data],
            "IMS_PER_BATCH": 2,
            "OPTS": [proposals if opt == ["proposals"] else opt for opt in opts],
        }
        for name, (head, data, opts, _) in kinds.items()
    }
    project.write(project.content)
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = change(Project(tmp_path_factory.mktemp("kinds")), KINDS)
    project.metrics = project.run()
    return project


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_evaluated_and_compared_with_a_trivial_predictor(finished: Project, kind: str) -> None:
    _, data, _, metrics = KINDS[kind]
    found = finished.metrics["expanded"][kind][data]
    assert set(found) == metrics
    assert all(np.isfinite(value) and 0 <= value <= 100 for value in found.values())
    trivial = finished.metrics["trivial"][kind][data]  # that of a network of proposals is no box
    assert kind == "boxless" or set(trivial) == metrics


def test_kinds_are_drawn(finished: Project) -> None:
    drawn = {path.name for path in (finished.root / "out/pictures").iterdir()}
    assert drawn == {f"{kind}_{KINDS[kind][1]}.png" for kind in KINDS if kind != "boxless"}


def test_student_learns_from_every_kind(finished: Project) -> None:
    last = json.loads((finished.root / "out/squeeze/metrics.json").read_text().splitlines()[-1])
    wanted = {"labels/loss_cls", "points/loss_keypoint", "given/loss_cls", "everything/loss_sem_seg"}
    assert wanted | {"depths/loss_depth"} <= last.keys()


def test_plan_counts_classes_of_each_kind(finished: Project) -> None:
    sources = finished.dry_run().split("branch")[0]
    rows = {line.split()[0]: line.split() for line in sources.splitlines() if line.split()}
    assert rows["everything"][4:7] == ["3", "+", "3"]
    assert rows["points"][4] == "1"
    assert rows["labels"][4] == "3"
    assert rows["depths"][4] == "-"


def test_proposals_of_one_source_can_be_given_to_another(finished: Project) -> None:
    file = finished.root / "out/expand/inference/boxless/k_points/k_points/box_proposals.pkl"
    records = with_proposals("k_points", DatasetCatalog.get("k_points"), str(file))
    assert all(len(record["proposal_boxes"]) for record in records)


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return change(Project(tmp_path), {})


def dry_run(project: Project, kind: str, *extra: Any, **values: Any) -> str:
    """The plan of one source of a kind, with more options or other values in its record."""
    change(project, {kind: KINDS[kind]})
    record = project.content["XLEARNER"]["SOURCES"][kind]
    record["OPTS"] = [*record["OPTS"], *extra]
    record.update(values)
    project.write(project.content)
    return project.dry_run()


@pytest.mark.parametrize(
    ("kind", "opts", "match"),
    [
        ("labels", ["MODEL.CLASSIFIER.MIXUP", 0.2], r"labels: MODEL\.CLASSIFIER\.MULTI_LABEL cannot be combined"),
        ("points", ["TEST.KEYPOINT_OKS_SIGMAS", [0.1]], "KEYPOINT_OKS_SIGMAS has 1 entries, but one for each of the 3"),
        ("points", ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 4], r"no image has 4 visible keypoint\(s\)"),
        ("given", ["DATASETS.PROPOSAL_FILES_TEST", []], "has 0 files for 1 data sets in TEST.*PROPOSAL_FILES_TEST"),
        ("given", ["DATASETS.PROPOSAL_FILES_TRAIN", ["no.pkl"]], r"the proposal file no\.pkl cannot be read"),
        ("depths", ["MODEL.DEPTH_HEAD.RANGE", [5.0, 1.0]], r"RANGE is \[5\.0, 1\.0\], but a nearest and a farther"),
        ("depths", ["MODEL.DEPTH_HEAD.IN_FEATURES", ["p9"]], r"IN_FEATURES names \['p9'\], but the backbone offers"),
    ],
)
def test_wrong_setting_of_a_kind(fresh: Project, kind: str, opts: list[Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dry_run(fresh, kind, *opts)


def test_objects_without_keypoints(fresh: Project) -> None:
    """In one image with an object that has them, so that it is not left out."""
    path = fresh.root / "data/keypoints.json"
    content = json.loads(path.read_text())
    bare = {key: value for key, value in content["annotations"][2].items() if key != "keypoints"}
    content["annotations"] += [{**bare, "id": 90}, {**bare, "id": 91, "iscrowd": 1}]
    wanted = (
        r"points\.TRAIN \['k_points'\]: 1 of 5 objects have no keypoints \(keypoints\), as in .*2\.jpg, but MODEL\.K"
    )
    change(fresh, {"points": KINDS["points"]})
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=wanted):
        fresh.dry_run()
    content["annotations"][-2]["keypoints"] = [0] * 9
    path.write_text(json.dumps(content))
    assert fresh.dry_run()


def test_boxes_for_a_classifier_of_one_label(fresh: Project) -> None:
    match = r"labels: the data set 'k_boxes' has no classes, which ImageClassifier .*MODEL\.CLASSIFIER\.MULTI_LABEL"
    with pytest.raises(ConfigError, match=match):
        dry_run(fresh, "labels", OPTS=["INPUT.CLASSIFICATION.SIZE", SIZE])


def test_test_set_without_an_evaluator(fresh: Project) -> None:
    MetadataCatalog.get("k_odd").set(evaluator_type="odd", thing_classes=["face"])
    DatasetCatalog.register("k_odd", lambda: DatasetCatalog.get("k_points"))
    try:
        with pytest.raises(ConfigError, match=r"boxless\.TEST: evaluator_type of .* 'k_odd' is 'odd', but coco"):
            dry_run(fresh, "boxless", TEST=["k_odd"])
    finally:
        DatasetCatalog.pop("k_odd")
        MetadataCatalog.pop("k_odd")


def test_images_without_labels_stay(fresh: Project) -> None:
    """A detector has nothing to learn from them, a classifier of several labels has."""
    path = fresh.root / "data/boxes.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:3]
    path.write_text(json.dumps(content))
    row = next(line for line in dry_run(fresh, "labels").splitlines() if line.startswith("labels"))
    assert row.split()[2] == "8"
