"""Shares, samplers and alternating steps in whole runs."""

import gc
import json
import re

import pytest
import torch
from test_processes import finish, start

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.provenance import describe_training
from xlearner_d2.engine.trainer import build_loader
from xlearner_d2.specs import ConfigError

TASKS = {"pics": "classification", "boxes": "detection", "areas": "segmentation"}


def only_training(project, steps):
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"]["PROBES"] = {}
    project.content["XLEARNER"]["STEPS"] = "alternating"
    project.content["XLEARNER"]["SQUEEZE"]["SOLVER"]["MAX_ITER"] = steps
    project.content["SOLVER"]["MAX_ITER"] = steps
    project.write(project.content)


def moved(folder, first, second, key="model"):
    """Names of the tensors that differ between two checkpoints, and of the others."""
    before, after = (read_checkpoint(folder / f"{name}.pth")[key] for name in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return changed, before.keys() - changed


@pytest.mark.parametrize("workers", [1, 2])
def test_idle_parameters_stay_bit_for_bit(project, workers):
    """Step 4 is the detector's; the others had theirs before, so momentum and weight decay would move them."""
    only_training(project, 5)
    options = ["SOLVER.WEIGHT_DECAY", 0.1]
    if workers == 1:
        project.run(*options)
    else:
        finish(start(project, "--num-gpus", workers, *options))
    changed, same = moved(project.root / "out/expand", "model_0000003", "model_final")
    own = ("heads.boxes.", "backbone.branches.detection.", "backbone.reconciliation.detection.")
    assert all(name.startswith(own) for name in changed)
    assert not [name for name in same if name.startswith(own) and name.endswith("weight")]
    assert (project.root / "out/student_d2.pth").is_file()
    lines = [json.loads(line) for line in (project.root / "out/squeeze/metrics.json").read_text().splitlines()]
    assert {"loss_hint_classification", "boxes/loss_mask"} <= set().union(*lines)


def test_steps_alternate_with_momentum_too(project):
    """In the squeeze, whose student all heads share, as in the expansion."""
    only_training(project, 4)
    project.run("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.001)
    assert (project.root / "out/student_d2.pth").is_file()


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ([], "6"),
        (["XLEARNER.SAMPLING.IMS_PER_BATCH", 9], "9"),
        (["XLEARNER.STEPS", "alternating", "XLEARNER.SOURCES.pics.IMS_PER_BATCH", 5], "3"),
        (["XLEARNER.STEPS", "alternating", "XLEARNER.SAMPLING.IMS_PER_BATCH", 4], "4"),
    ],
)
def test_the_model_card_has_the_images_that_a_step_draws(project, monkeypatch, options, images):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    plan = make_plan(project.load(*options), world_size=1)
    assert describe_training(plan)["steps"] == f"2 of expansion, then 2 of squeeze, of {images} images each"


def test_a_share_of_the_images_is_trained_on_and_all_are_tested_on(project, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    chosen = {}
    for seed in (0, 1):
        plan = make_plan(project.load("XLEARNER.SOURCES.boxes.TRAIN_SHARE", 0.5, "SEED", seed), world_size=1)
        chosen[seed] = {record["file_name"] for record in plan.data["boxes"].train}
        assert [len(data.train) for data in plan.data.values()] == [4 if name == "boxes" else 8 for name in plan.data]
        assert {len(records) for data in plan.data.values() for records in data.test.values()} == {8}
    assert chosen[0] != chosen[1]


def test_training_records_are_held_serialised_alone(project, monkeypatch):
    """As objects they take several times the memory, and each process that reads would copy them sooner or later."""

    def records_as_objects() -> int:  # of boxes: Python's collector does not know of dicts of strings and numbers alone
        gc.collect()
        return sum(type(it) is dict and {"file_name", "annotations"} <= it.keys() for it in gc.get_objects())

    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    before = records_as_objects()
    plan = make_plan(project.load(), world_size=1)
    loader = build_loader(plan, "expand")
    assert records_as_objects() - before == sum(map(len, plan.data["boxes"].test.values()))
    assert {len(records) for records in loader.dataset.records.values()} == {8}


def test_shares_and_turns_are_in_the_plan(project):
    total = ["XLEARNER.SAMPLING.IMS_PER_BATCH", 12]
    plan = project.dry_run(*total)
    assert len(re.findall(r"(?:pics|boxes|areas) .* 8 +8 +3 +4 +1 ", plan)) == 3  # 2 * 4 / 8 epochs
    plan = project.dry_run(*total, "XLEARNER.STEPS", "alternating")
    assert len(re.findall(r"(?:pics|boxes|areas) .* 8 +8 +3 +12 +4 of 12 +1 ", plan)) == 3
    plan = project.dry_run("XLEARNER.STEPS", "alternating")
    assert len(re.findall(r"(?:pics|boxes|areas) .* 8 +8 +3 +2 +1 of 3 +0\.2", plan)) == 3


def test_shares_replace_what_the_sources_say(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
        plan = make_plan(project.load("XLEARNER.SAMPLING.IMS_PER_BATCH", 18), world_size=3)
    assert [source.ims_per_batch for source in plan.drawn["expand"].sources] == [6, 6, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["XLEARNER.SAMPLING.IMS_PER_BATCH", 2],
            r"SAMPLING\.IMS_PER_BATCH: 2 images .* by 3 sources: at least 3",
        ),
        (["XLEARNER.SAMPLING.IMS_PER_BATCH", -1], r"SAMPLING\.IMS_PER_BATCH is -1, but a number of at least 0"),
        (["XLEARNER.SAMPLING.TEMPERATURE", 0.0], r"SAMPLING\.TEMPERATURE is 0\.0, but a positive number is expected"),
        (["XLEARNER.STEPS", "jiont"], r"XLEARNER\.STEPS is 'jiont'\. Did you mean 'joint'\?"),
        (["XLEARNER.SOURCES.pics.SAMPLER", "class"], r"pics\.SAMPLER is 'class'\. Did you mean 'class_aware'\?"),
        (["XLEARNER.SOURCES.areas.SAMPLER", "class_aware"], r"SOURCES\.areas\.TRAIN .* no class of images, boxes or"),
    ],
)
def test_bad_settings(project, options, message):
    with pytest.raises(ConfigError, match=message):
        project.dry_run(*options)


def test_workers_must_share_a_step_evenly(project):
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 10, but a multiple of the number of workers, 4,"):
        make_plan(project.load("XLEARNER.SAMPLING.IMS_PER_BATCH", 10), world_size=4)
