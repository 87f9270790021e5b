"""Every kind of supervision through a whole run: checked, trained, evaluated, compared, drawn, squeezed."""

import json

import numpy as np
import pytest
from conftest import Project
from disk_data import SIZE
from kinds_data import register_panoptic, write_kinds

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
