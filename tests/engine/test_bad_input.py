"""Each bad input stops a run before it starts, with one message that names source, file and setting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xlearner_d2.engine.plan_checks import check_settings
from xlearner_d2.specs import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def set_source(project, name, **values):
    project.content["XLEARNER"]["SOURCES"][name].update(values)
    project.write(project.content)


def rewrite_json(project, change):
    path = project.root / "data/boxes.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def duplicate_source(project):
    text = project.file.read_text()
    record = "    pics: {TASK: other, CONFIG: x, TRAIN: [t_pics]}\n"
    project.file.write_text(text.replace("  SOURCES:\n", "  SOURCES:\n" + record))


def other_classes(project):
    for name in ("cow", "dog"):
        folder = project.root / "data/other" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "1.png")
    project.content["XLEARNER"]["DATASETS"]["t_other"] = {"FORMAT": "image_folder", "IMAGES": "other"}
    set_source(project, "pics", TEST=["t_other"])


def probe_without_a_second_image(project):
    other_classes(project)
    set_source(project, "pics", TEST=[])
    project.content["XLEARNER"]["PROBES"] = {"rare": {"TRAIN": "t_other", "TEST": "t_other"}}
    project.write(project.content)


def set_probe(project, **record):
    project.content["XLEARNER"]["PROBES"] = {"mine": record}
    project.write(project.content)


def other_ignored(project):
    sets = project.content["XLEARNER"]["DATASETS"]
    sets["t_ignored"] = {**sets["t_areas"], "IGNORE_VALUE": 7}
    set_source(project, "areas", TRAIN=["t_areas", "t_ignored"])


def label_99(project):
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(project.root / "data/areas/labels/3.png")


def empty_folder(project):
    (project.root / "data/nothing").mkdir()
    project.content["XLEARNER"]["DATASETS"]["t_pics"]["IMAGES"] = "nothing"
    project.write(project.content)


def voc_source(project):
    folder = project.root / "data/voc"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "JPEGImages/a.jpg")
    (folder / "Annotations/a.xml").write_text("<annotation><size></annotation>")
    project.content["XLEARNER"]["DATASETS"]["t_voc"] = {"FORMAT": "voc", "ROOT": "voc", "SPLIT": "train"}
    set_source(project, "boxes", TRAIN=["t_voc"], TEST=[])


def voc_without_what_its_evaluation_reads(project):
    voc_source(project)
    item = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    text = f"<annotation><size><width>64</width><height>64</height></size>{item}</annotation>"
    (project.root / "data/voc/Annotations/a.xml").write_text(text)
    opts = project.content["XLEARNER"]["SOURCES"]["boxes"]["OPTS"]
    set_source(project, "boxes", TEST=["t_voc"], OPTS=[*opts, "MODEL.MASK_ON", False])


def dilated_neighbour(project):
    """A second head of the detection task that wants another stride of res5."""
    record = dict(project.content["XLEARNER"]["SOURCES"]["boxes"])
    record["CONFIG"] = "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"
    record["OPTS"] = []
    project.content["XLEARNER"]["SOURCES"]["dilated"] = record
    project.write(project.content)


def two_strides_of_res5(project):
    """The dilated head with a branch of its own, which the expansion can train but the student cannot have as well."""
    dilated_neighbour(project)
    set_source(project, "dilated", TASK="dense")


CASES = {
    "annotation that Pascal VOC's evaluation cannot read": (
        voc_without_what_its_evaluation_reads,
        r"SOURCES\.boxes\.TEST: .*a\.xml: Pascal VOC evaluation needs name, pose, truncated",
    ),
    "unknown data set": (
        lambda p: set_source(p, "pics", TRAIN=["t_pic"]),
        r"SOURCES\.pics\.TRAIN names the unknown data set 't_pic'\. Did you mean 't_pics'\?",
    ),
    "missing image": (
        lambda p: (p.root / "data/boxes/3.png").unlink(),
        r"source boxes: .*boxes/3\.png does not exist",
    ),
    "unreadable image": (lambda p: cut(p.root / "data/boxes/3.png"), r"source boxes: .*boxes/3\.png"),
    "text instead of an image": (
        lambda p: (p.root / "data/pics/cat/0.png").write_text("hello"),
        r"source pics.*pics/cat/0\.png cannot be decoded",
    ),
    "malformed json": (lambda p: cut(p.root / "data/boxes.json"), r"t_boxes.*boxes\.json"),
    "malformed xml": (voc_source, r"'t_voc': .*a\.xml is not valid XML"),
    "category outside the classes": (
        lambda p: rewrite_json(p, lambda content: content["annotations"][0].update(category_id=77)),
        r"t_boxes.*boxes\.json.*77",
    ),
    "label outside the classes": (label_99, r"source areas: .*areas/labels/3\.png.*99"),
    "box outside the image": (
        lambda p: rewrite_json(p, lambda content: content["annotations"][0].update(bbox=[50, 50, 40, 40])),
        r"source boxes: .*boxes/0\.png: the box \[50\.0, 50\.0, 40\.0, 40\.0\] .* exceeds its image of width 64",
    ),
    "empty source": (empty_folder, r"t_pics.*nothing"),
    "no annotation at all": (
        lambda p: rewrite_json(p, lambda content: content.update(annotations=[])),
        r"SOURCES\.boxes\.TRAIN \['t_boxes'\]: no image has an annotation",
    ),
    "RLE mask among polygons": (
        lambda p: rewrite_json(
            p, lambda content: content["annotations"][6].update(segmentation={"size": [64, 64], "counts": [0, 4096]})
        ),
        r"TRAIN \['t_boxes'\]: 1 of 8 objects have an RLE mask, as in .*6\.png, but INPUT\.MASK_FORMAT is 'polygon'",
    ),
    "object without a mask": (
        lambda p: rewrite_json(p, lambda content: content["annotations"][6].pop("segmentation")),
        r"SOURCES\.boxes\.TRAIN \['t_boxes'\]: 1 of 8 objects have no mask \(segmentation\), as in .*boxes/6\.png, but",
    ),
    "two sources of one name": (duplicate_source, r"config\.yaml: XLEARNER\.SOURCES\.pics is given twice"),
    "other classes in test": (other_classes, r"source pics.*'cat'.*'cow'"),
    "a probe that cannot choose": (
        probe_without_a_second_image,
        r"probe rare: no class of data set 't_other' has more than one image",
    ),
    "a probe of boxes": (
        lambda p: set_probe(p, TRAIN="t_boxes", TEST="t_boxes"),
        r"probe mine: data set 't_boxes': 8 of 8 images have no category_id, as .*boxes/0\.png, but a probe needs one",
    ),
    "a probe of no pixels": (
        lambda p: set_probe(p, TRAIN="t_pics", TEST="t_pics", IMAGE_SIZE=0),
        r"PROBES\.mine\.IMAGE_SIZE is 0, but at least 1 is expected",
    ),
    "labels that are ignored in one data set alone": (
        other_ignored,
        r"SOURCES\.areas: data sets 't_areas' and 't_ignored' should have the same ignore_label, but .* 255 and 7",
    ),
    "wrong kind of data": (
        lambda p: set_source(p, "boxes", TRAIN=["t_pics"], TEST=[]),
        r"SOURCES\.boxes: the data set 't_pics' has no thing_classes, which GeneralizedRCNN learns from",
    ),
    "another network than the branch's": (
        lambda p: set_source(p, "areas", OPTS=["MODEL.RESNETS.RES2_OUT_CHANNELS", 32]),
        r"SOURCES\.areas\.OPTS sets MODEL\.RESNETS\.RES2_OUT_CHANNELS to 32, but it holds for all sources and is 16",
    ),
    "other pixels than the branch's": (
        lambda p: set_source(p, "areas", OPTS=["MODEL.PIXEL_STD", [57.0, 57.0, 58.0]]),
        r"OPTS sets MODEL\.PIXEL_STD to \[57\.0, 57\.0, 58\.0\], but it holds for all sources and is \[1\.0, 1\.0",
    ),
    "mismatching strides": (
        dilated_neighbour,
        r"heads of task 'detection' want different strides of res5 \(boxes has stride 32, dilated has stride 16\)",
    ),
    "two strides of the student's res5": (
        two_strides_of_res5,
        r"The student has one res5, .* \(.*dense has stride 16.*\): .* XLEARNER\.SQUEEZE\.TASK_LOSSES to False",
    ),
    "unknown key": (
        lambda p: set_source(p, "pics", IMS_PER_BACH=4),
        r"SOURCES\.pics has the unknown key 'IMS_PER_BACH'\. Did you mean 'IMS_PER_BATCH'\?",
    ),
    "unknown head": (
        lambda p: set_source(p, "pics", CONFIG="COCO-Detection/nothing.yaml"),
        r"SOURCES\.pics\.CONFIG is 'COCO-Detection/nothing\.yaml': there is neither a file",
    ),
    "no such folder": (
        lambda p: (p.root / "data/areas/images").rename(p.root / "data/areas/moved"),
        r"data set 't_areas'.*areas/images",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_stops_before_anything_is_written(project, name):
    spoil, message = CASES[name]
    spoil(project)
    with pytest.raises(ConfigError, match=message):
        project.run()
    assert not (project.root / "out").exists()


def test_all_problems_of_a_config_are_listed_at_once(project):
    set_source(project, "pics", IMS_PER_BATCH=0, TRAIN=["nope"])
    set_source(project, "boxes", LOSS_WEIGHT="much")
    with pytest.raises(ConfigError) as caught:
        project.run("XLEARNER.SHARING", "joined", "XLEARNER.SQUEEZE.DISTANCE", "far", "XLEARNER.COMPILE", "inductr")
    assert len(caught.value.problems) == 6
    assert str(caught.value).startswith("The configuration has 6 problems:\n  1. ")


@pytest.mark.parametrize("where", ["SOLVER", "XLEARNER.SQUEEZE.SOLVER"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MAX_ITER", 0, r"MAX_ITER is 0, but a number of steps of at least 1 is expected"),
        ("BASE_LR", -1.0, r"BASE_LR is -1\.0, but a positive number is expected"),
        ("CHECKPOINT_PERIOD", 0, r"CHECKPOINT_PERIOD is 0, but a number of steps of at least 1 is expected"),
        ("CHECKPOINT_PERIOD", -5, r"CHECKPOINT_PERIOD is -5, but a number of steps of at least 1 is expected"),
        ("OPTIMIZER", "Adam", r"OPTIMIZER is 'Adam', but one of SGD, AdamW is expected"),
        ("BASE_LR_END", 0.5, r"BASE_LR_END is 0\.5, but a rate from 0 to BASE_LR, 0\.001, is expected"),
        ("LR_SCHEDULER_NAME", "Cosine", r" is refused by Detectron2 or PyTorch: Unknown LR scheduler: Cosine\."),
        ("WARMUP_METHOD", "slow", r" is refused by Detectron2 or PyTorch: .*slow"),
    ],
)
def test_settings_of_both_solvers_that_would_end_a_run_midway(project, where, key, value, message):
    with pytest.raises(ConfigError, match=rf"(?m)^  1\. {where}\.?{message}"):
        project.dry_run(f"{where}.{key}", value)


def test_an_online_squeeze_without_an_expansion_is_no_run(project):
    with pytest.raises(ConfigError, match=r"ONLINE squeezes in the steps of the expansion, which is not run: set"):
        project.dry_run("XLEARNER.STAGE", "squeeze", "XLEARNER.SQUEEZE.ONLINE", True)


def test_an_online_squeeze_has_no_other_teacher(project, tmp_path):
    teacher = tmp_path / "expanded.pth"
    teacher.touch()
    with pytest.raises(
        ConfigError, match=r"TEACHER is '.*expanded\.pth', but ONLINE squeezes the branches of this run"
    ):
        project.dry_run("XLEARNER.SQUEEZE.ONLINE", True, "XLEARNER.SQUEEZE.TEACHER", str(teacher))


@pytest.mark.parametrize("wrong", [{"WEIGHT_DECAY": 0}, {"CLIP_GRADIENTS": {"ENABLE": True}}])
def test_what_a_solver_of_the_squeeze_cannot_hold(project, wrong):
    project.content["XLEARNER"]["SQUEEZE"]["SOLVER"] |= wrong
    project.write(project.content)
    with pytest.raises(ConfigError, match=r"1\. XLEARNER\.SQUEEZE\.SOLVER is refused .*(WEIGHT_DECAY|CLIP_GRADIENTS)"):
        project.dry_run()


def test_a_config_without_its_base_is_told_so(project):
    project.content["MODEL"]["META_ARCHITECTURE"] = "GeneralizedRCNN"  # Detectron2's own
    project.write(project.content)
    with pytest.raises(ConfigError, match=r"META_ARCHITECTURE is 'GeneralizedRCNN'.*_BASE_: configs/base\.yaml"):
        project.dry_run()


@pytest.mark.parametrize("place", ["{root}/config.yaml/out", "{root}/config.yaml"])
def test_a_folder_for_results_that_cannot_be_made(project, place):
    place = place.format(root=project.root)
    with pytest.raises(
        ConfigError, match=rf"OUTPUT_DIR is '{place}', which is no folder that can be made or written to"
    ):
        project.dry_run("OUTPUT_DIR", place)


def test_an_unknown_kind_of_clipping_is_refused_for_both_stages(project):
    wrong = {"CLIP_GRADIENTS": {"CLIP_TYPE": "nrom"}}
    project.content["SOLVER"] |= wrong
    project.content["XLEARNER"]["SQUEEZE"]["SOLVER"] |= wrong
    project.write(project.content)
    with pytest.raises(ConfigError) as caught:
        project.dry_run()
    message = "CLIP_GRADIENTS.CLIP_TYPE is 'nrom', but one of value, norm, full_model is expected."
    assert caught.value.problems == [f"SOLVER.{message}", f"XLEARNER.SQUEEZE.SOLVER.{message}"]


def test_the_command_says_it_in_one_message_and_exits_with_an_error(project):
    set_source(project, "pics", TRAIN=["t_pic"])
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(project.file)],
        capture_output=True,
        text=True,
        cwd=project.root,
        env={**os.environ, "DETECTRON2_DATASETS": str(project.root / "data")},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: The configuration has 1 problem:\n")
    assert "Did you mean 't_pics'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_devices_that_are_not_there(project, monkeypatch):
    wish = "but cpu, cuda, or a certain GPU such as cuda:0 is expected."
    assert check_settings(project.load("MODEL.DEVICE", "gpu"), 1) == [f"MODEL.DEVICE is 'gpu', {wish}"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (problem,) = check_settings(project.load("MODEL.DEVICE", "cuda:2"), 1)
    assert problem == "MODEL.DEVICE is 'cuda:2', but this machine has 2 usable GPUs, counted from 0."
    assert check_settings(project.load("MODEL.DEVICE", "cuda:1"), 1) == []
