"""Before several workers start: parameters for whose gradients they would wait in vain."""

import argparse
from contextlib import nullcontext

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from kept_bytes import peak_bytes

from xlearner_d2.engine.plan import make_plan
from xlearner_d2.engine.run import validate
from xlearner_d2.engine.squeeze import build_squeeze_hook
from xlearner_d2.engine.trainer import build_loader
from xlearner_d2.engine.trial import expected_memory
from xlearner_d2.specs import ConfigError


@pytest.fixture
def plan(project, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    return lambda world_size: make_plan(project.load(), world_size=world_size)


@pytest.mark.parametrize("workers", [1, 2])
def test_parameters_without_gradient_are_refused_where_workers_wait_for_them(plan, workers):
    plan = plan(workers)
    model = build_model(plan.cfg)
    model.heads["pics"].register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
    if workers == 1:
        assert all(size > 0 for size in expected_memory(plan, model).values())
        return
    with pytest.raises(ConfigError, match=r"heads.pics: heads.pics.idle and perhaps others get no gradient"):
        expected_memory(plan, model)
    model.heads["pics"].idle.requires_grad_(False)
    assert all(size > 0 for size in expected_memory(plan, model).values())


def test_a_squeeze_alone_waits_for_the_heads_that_it_trains(project, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    for learns in (True, False):
        plan = make_plan(
            project.load("XLEARNER.STAGE", "squeeze", "XLEARNER.SQUEEZE.TASK_LOSSES", learns), world_size=2
        )
        model = build_model(plan.cfg)
        model.backbone.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))  # of the teacher alone
        expected_memory(plan, model)
        model.heads["pics"].register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
        with pytest.raises(ConfigError, match=r"heads.pics.idle and") if learns else nullcontext():
            expected_memory(plan, model)


@pytest.mark.parametrize("sharing", ["separate", "shared", "bidirectional"])
def test_every_parameter_of_ours_gets_a_gradient(project, monkeypatch, sharing):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    options = argparse.Namespace(dry_run=True, resume=False, eval_only=False)
    assert "The plan" in validate(project.load("XLEARNER.SHARING", sharing), options, world_size=2)[1]


@pytest.mark.parametrize("sharing", ["separate", "detached", "shared", "bidirectional"])
def test_expected_memory_is_that_of_a_step(project, monkeypatch, sharing):
    """Of one branch after another where they learn apart; a trial's two images stand for a batch, whose sizes vary."""
    del project.content["XLEARNER"]["SOURCES"]["boxes"]  # what its head keeps varies with the proposals it draws
    project.write(project.content)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    plan = make_plan(project.load("XLEARNER.SHARING", sharing), world_size=1)
    model = build_model(plan.cfg)
    expected = expected_memory(plan, model)
    batch = next(iter(build_loader(plan, "expand")))

    def expand():
        with EventStorage():
            for losses in model.losses_by_branch(batch):
                sum(losses.values()).backward()

    weights = sum(p.numel() for p in model.parameters())
    assert 1e9 * expected["expand"] - 16 * weights == pytest.approx(peak_bytes(expand, model), rel=0.25)

    distiller = build_squeeze_hook(plan, model.freeze(), [], max_iter=1).inner.module
    student = sum(p.numel() for p in distiller.parameters())
    least = 2 * 4 * weights + 16 * student  # the teacher, and the model it was read from, which waits for its report

    def squeeze():
        with EventStorage():
            sum(distiller(batch).values()).backward()

    assert 0.9 < 1e9 * expected["squeeze"] / (least + peak_bytes(squeeze, distiller)) < 1.4
