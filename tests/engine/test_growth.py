"""Growth in whole runs: what was there keeps its results, what does not fit is said before anything starts."""

import json

import pytest
import torch
from conftest import Project
from disk_data import NAMES
from test_processes import finish, start

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.specs import ConfigError

FREEZE = "XLEARNER.FREEZE", "[classification, segmentation]"


def weights(path):
    return read_checkpoint(path)["model"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An expansion without the detector, after two steps."""
    project = Project(tmp_path_factory.mktemp("small"))
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)
    project.metrics = project.run("XLEARNER.STAGE", "expand", "XLEARNER.SOURCES.boxes", "null")
    project.expanded = project.root / "out/expanded.pth"
    return project


@pytest.fixture
def larger(project, small):
    """A project that extends it by the detector."""
    project.content["XLEARNER"] |= {"EXTEND": str(small.expanded), "PROBES": {}}
    project.write(project.content)
    return project


@pytest.mark.parametrize("workers", [1, 2])
def test_frozen_sources_keep_their_results_without_training_data(small, larger, workers):
    """Training, evaluation and squeeze; ``pics`` has no data at all, and the class count comes from the file."""
    sources = larger.content["XLEARNER"]["SOURCES"]
    del sources["areas"]["TRAIN"], sources["pics"]["TRAIN"], sources["pics"]["TEST"]
    larger.write(larger.content)
    options = [*FREEZE, "SOLVER.WEIGHT_DECAY", 0.1]
    if workers == 1:
        larger.run(*options)
    else:
        finish(start(larger, "--num-gpus", workers, *options))
    metrics = json.loads((larger.root / "out/metrics.json").read_text())["expanded"]
    assert metrics["areas"] == small.metrics["expanded"]["areas"]
    assert set(metrics) == {"areas", "boxes"}
    before, after = weights(small.expanded), weights(larger.root / "out/expanded.pth")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for branch in ("classification", "segmentation"):
        into = f"backbone.reconciliation.{branch}.layers.detection."
        last = [name for name in after if name.startswith(into) and name.endswith("norm.weight")]
        assert any(not after[name].any() for name in last)
    assert (larger.root / "out/student_d2.pth").is_file()
    log = (larger.root / "out/log.txt").read_text()
    assert "new: branch detection, head boxes, 24 reconciliation layers" in log
    assert "Branch detection starts as branch segmentation" in log


def test_a_source_joins_a_task_and_all_learn_on(small, larger):
    sources = larger.content["XLEARNER"]["SOURCES"]
    sources["more"] = {**sources["pics"], "TEST": []}
    del sources["boxes"]
    larger.write(larger.content)
    plan = larger.dry_run()
    assert "head areas, head pics, 12 reconciliation layers; new: head more" in plan
    larger.run("XLEARNER.STAGE", "expand", "SOLVER.BASE_LR", 1e-12)
    after = weights(larger.root / "out/expanded.pth")
    for name, value in weights(small.expanded).items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)


def test_a_frozen_task_that_listens_to_one_that_learns_is_told(larger):
    told = "The outputs of classification will change all the same, as it receives features from segmentation"
    assert told in larger.dry_run("XLEARNER.FREEZE", "[classification]")
    assert "will change all the same" not in larger.dry_run(*FREEZE)


def test_the_new_head_of_a_frozen_task_is_trained(small, larger):
    sources = larger.content["XLEARNER"]["SOURCES"]
    sources["more"] = {**sources["pics"], "TEST": []}
    del sources["boxes"]
    larger.write(larger.content)
    larger.run("XLEARNER.STAGE", "expand", *FREEZE, "XLEARNER.EXTEND_INIT", "random")
    after = weights(larger.root / "out/expanded.pth")
    assert all(torch.equal(after[name], value) for name, value in weights(small.expanded).items())
    assert "loss" in (larger.root / "out/expand/metrics.json").read_text()


def test_new_branches_start_as_asked(small, larger):
    """Here from a ResNet checkpoint: the plain backbone of a branch, saved on its own."""
    prefix = "backbone.branches.segmentation."
    branch = {n.removeprefix(prefix): v for n, v in weights(small.expanded).items() if n.startswith(prefix)}
    torch.save(branch, larger.root / "resnet.pth")
    for number, init in enumerate(("segmentation", str(larger.root / "resnet.pth"))):
        folder = larger.root / f"out{number}"
        options = ["XLEARNER.EXTEND_INIT", init, "SOLVER.BASE_LR", 1e-12, "OUTPUT_DIR", folder]
        larger.run("XLEARNER.STAGE", "expand", *FREEZE, *options)
        after = weights(folder / "expanded.pth")
        for name in ("stem.conv1.weight", "res5.0.conv1.weight"):
            torch.testing.assert_close(after[f"backbone.branches.detection.{name}"], branch[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["XLEARNER.EXTEND", "nowhere.pth"], r"There is no checkpoint nowhere\.pth"),
        (["XLEARNER.FREEZE", "detection"], r"FREEZE is 'detection', but a list of tasks such as \[detection\]"),
        (["XLEARNER.FREEZE", "[detecton]"], r"FREEZE names 'detecton', which is no task of .*expanded\.pth"),
        (["XLEARNER.FREEZE", "[detection]"], r"FREEZE names 'detection', which is no task of .*expanded\.pth"),
        (
            ["XLEARNER.SOURCES.pics.TASK", "detection"],
            r"pics\.TASK is 'detection', but 'classification' in ",
        ),
        (["MODEL.RESNETS.WIDTH_PER_GROUP", 8], r"MODEL\.RESNETS\.WIDTH_PER_GROUP is 8, but .* was trained with 4"),
        (["MODEL.RESNETS.DEPTH", 101], r"MODEL\.RESNETS\.DEPTH is 101, but .*expanded\.pth was trained with 50"),
        (["MODEL.PIXEL_STD", [2.0, 1.0, 1.0]], r"MODEL\.PIXEL_STD is \[2\.0, 1\.0, 1\.0\], but .* was trained with"),
        (["XLEARNER.SHARING", "separate"], r"SHARING is 'separate', which cannot continue .* with 'detached'"),
        (["XLEARNER.RECONCILIATION.STAGES", ["res2"]], r"RECONCILIATION\.STAGES is \['res2'\], but"),
        (["XLEARNER.EXTEND_INIT", "detecton"], r"EXTEND_INIT is 'detecton', no task of .* and no file"),
        (["MODEL.WEIGHTS", __file__], r"MODEL\.WEIGHTS and XLEARNER\.EXTEND cannot both be set"),
        (["XLEARNER.SOURCES.pics.TRAIN", []], r"SOURCES\.pics\.TRAIN is empty, but at least one data set is needed"),
        (
            [*FREEZE, "XLEARNER.SOURCES.pics", "null"],
            r"FREEZE names 'classification', all of whose sources are dropped",
        ),
        ([*FREEZE, "XLEARNER.SOURCES.boxes", "null"], r"FREEZE leaves nothing to train"),
        (
            ["XLEARNER.EXTEND", "", "XLEARNER.FREEZE", "[detection]"],
            r"FREEZE is \['detection'\], but ",
        ),
        (
            ["XLEARNER.SOURCES.pics.OPTS", ["MODEL.CLASSIFIER.NUM_CLASSES", 5]],
            r"has heads\.pics\.linear\.weight of shape \(3, 128\), but \(5, 128\) is needed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(larger, options, message):
    with pytest.raises(ConfigError, match=message):
        larger.dry_run(*options)
    assert not (larger.root / "out").exists()


def test_classes_are_those_of_the_file_by_name(larger, small):
    """As many, in another order: the head of the file would name each of them wrongly."""
    assert read_checkpoint(small.expanded)["xlearner"]["class_names"]["pics"] == {"classes": list(NAMES)}
    for record in larger.content["XLEARNER"]["DATASETS"].values():
        if record["FORMAT"] == "image_folder":
            record["CLASSES"] = list(NAMES[::-1])
    larger.write(larger.content)
    there = r"SOURCES\.pics has other classes than XLEARNER\.EXTEND .*expanded\.pth"
    with pytest.raises(ConfigError, match=f"{there}: class 0 is 'cat' in the file and 'eel' in the data"):
        larger.dry_run()


def test_a_source_of_the_file_is_kept_or_dropped_by_name(larger):
    del larger.content["XLEARNER"]["SOURCES"]["pics"]
    larger.write(larger.content)
    wish = r"has the source 'pics', which the config has not: .* or drop it with XLEARNER\.SOURCES\.pics: null"
    with pytest.raises(ConfigError, match=wish):
        larger.dry_run()
    plan = larger.dry_run("XLEARNER.SOURCES.pics", "null")
    assert "loaded branch segmentation, head areas; new: branch detection, head boxes, 12 reconciliation layers" in plan


def test_a_branch_ends_where_the_sources_that_stay_end(project):
    """Without the source that reads res5, the branch has no res5, nor layers into it."""
    sources = project.content["XLEARNER"]["SOURCES"]
    shallow = [*sources["pics"]["OPTS"], "MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.CLASSIFIER.IN_FEATURE", "res4"]
    sources["shallow"] = {**sources["pics"], "TEST": [], "OPTS": shallow}
    del sources["boxes"]
    project.content["XLEARNER"] |= {"PROBES": {}, "RECONCILIATION": {"STAGES": ["res4", "res5"]}}
    project.write(project.content)
    project.run("XLEARNER.STAGE", "expand")
    expanded, folder = project.root / "out/expanded.pth", project.root / "longer"
    extend = ["XLEARNER.STAGE", "expand", "XLEARNER.EXTEND", expanded, "SOLVER.BASE_LR", 1e-12, "OUTPUT_DIR", folder]
    project.run(*extend, "XLEARNER.SOURCES.pics", "null")
    before, after = weights(expanded), weights(folder / "expanded.pth")
    gone = ("backbone.branches.classification.res5.", "heads.pics.")
    layers = [n for n in before if "_to_res5." in n and n not in after]
    assert layers
    assert all(".classification." in name for name in layers)
    assert set(before) - set(after) == {n for n in before if n.startswith(gone)} | {*layers}
    for name in ("backbone.branches.classification.res4.0.conv1.weight", "heads.shallow.linear.weight"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert (
        "no head reads it any more: res5 of branch classification, 5 reconciliation layers."
        in (folder / "log.txt").read_text()
    )


def test_a_checkpoint_of_something_else_is_refused(larger, small):
    torch.save({"model": {"x": torch.zeros(1)}}, larger.root / "other.pth")
    with pytest.raises(ConfigError, match=r"XLEARNER\.EXTEND: .*other\.pth is no expanded checkpoint"):
        larger.dry_run("XLEARNER.EXTEND", larger.root / "other.pth")
