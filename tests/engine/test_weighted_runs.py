"""Weights of losses in whole runs: resumed exactly, on two workers, in both stages."""

import json

import pytest
import torch
from test_processes import finish, start

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.specs import ConfigError


def prepare(project, method, steps):
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    x = project.content["XLEARNER"]
    x["PROBES"] = {}
    x["WEIGHTING"] = {"METHOD": method, "WINDOW": 3}
    x["SQUEEZE"]["SOLVER"]["MAX_ITER"] = steps
    project.content["SOLVER"]["MAX_ITER"] = steps
    project.write(project.content)


def loss_weights(found, stage):
    if stage == "expand":
        return found["loss_weights"]
    return found["trainer"]["hooks"]["SqueezeHook"]["weights"]["loss_weights"]


def checkpoint(project, stage, name="model_final"):
    return read_checkpoint(project.root / "out" / stage / f"{name}.pth")


@pytest.mark.parametrize("method", ["uncertainty", "dwa"])
def test_weights_are_found_saved_and_resumed_exactly(project, method):
    """The second run goes on from step 7 of 9, in the middle of a window."""
    prepare(project, method, 9)
    out = project.root / "out"
    project.run()
    first = {stage: checkpoint(project, stage) for stage in ("expand", "squeeze")}
    weights = loss_weights(first["expand"], "expand")
    if method == "dwa":
        assert weights["_extra_state"] == {"num_steps": 9}
        assert float(weights["current"].sum()) == pytest.approx(3)
        assert len(weights["current"].unique()) > 1
    else:
        assert all(value.abs() > 0 for value in weights.values())
    lines = [json.loads(line) for line in (out / "expand/metrics.json").read_text().splitlines()]
    assert {"pics/weight", "boxes/weight", "areas/weight"} <= lines[-1].keys()
    for stage in ("expand", "squeeze"):
        (out / stage / "last_checkpoint").write_text("model_0000007.pth")
        (out / stage / "model_final.pth").unlink()
    for name in ("expanded.pth", "student_d2.pth"):
        (out / name).unlink()
    project.run(resume=True)
    for stage in ("expand", "squeeze"):
        again = checkpoint(project, stage)
        assert all(torch.equal(value, again["model"][name]) for name, value in first[stage]["model"].items())
        weights, resumed = (loss_weights(found, stage) for found in (first[stage], again))
        assert weights.pop("_extra_state", None) == resumed.pop("_extra_state", None)
        assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


@pytest.mark.parametrize("method", ["uncertainty", "dwa"])
def test_two_workers_hold_one_state(project, method):
    """Each has seen other images; in steps that use all sources, and in those of one source."""
    prepare(project, method, 7)
    finish(start(project, "--num-gpus", 2, "XLEARNER.STEPS", "alternating"))
    for stage in ("expand", "squeeze"):
        weights = loss_weights(checkpoint(project, stage), stage)
        assert weights
        if method == "dwa":
            assert weights["_extra_state"] == {"num_steps": 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["METHOD", "dwaa"], r"WEIGHTING\.METHOD is 'dwaa'\. Did you mean 'dwa'\?"),
        (["TEMPERATURE", 0.0], r"WEIGHTING\.TEMPERATURE is 0\.0, but a positive number is expected"),
        (["WINDOW", 0], r"WEIGHTING\.WINDOW is 0, but a number of at least 1 is expected"),
    ],
)
def test_bad_settings(project, options, message):
    with pytest.raises(ConfigError, match=message):
        project.dry_run("XLEARNER.WEIGHTING.METHOD", "dwa", f"XLEARNER.WEIGHTING.{options[0]}", options[1])


ALTERNATING = ["XLEARNER.STEPS", "alternating"]


def test_a_window_holds_a_round(project):
    options = [*ALTERNATING, "XLEARNER.WEIGHTING.METHOD", "dwa", "XLEARNER.WEIGHTING.WINDOW"]
    with pytest.raises(ConfigError, match=r"WINDOW is 2, but a number of at least 3, a round of alternating steps,"):
        project.dry_run(*options, 2)
    # Sources of one size: 4 of 12 steps each, which is every third one.
    assert project.dry_run(*options, 3, "XLEARNER.SAMPLING.IMS_PER_BATCH", 12)


def test_fixed_weights_have_no_window(project):
    assert project.dry_run(*ALTERNATING, "XLEARNER.SAMPLING.IMS_PER_BATCH", 128)
    assert project.dry_run(*ALTERNATING, "XLEARNER.WEIGHTING.WINDOW", 2)
