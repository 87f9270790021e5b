"""The student is a whole network, whatever the heads read; what it cannot learn is refused before any training."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import Project, config
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from test_processes import finish, start

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine import evaluate
from xlearner_d2.engine.evaluate import probe_student
from xlearner_d2.engine.plan import Plan, make_plan
from xlearner_d2.engine.squeeze import SqueezeHook, build_squeeze_hook
from xlearner_d2.engine.trainer import build_loader
from xlearner_d2.exports.student import load_student

LABELS, HINTS = (("XLEARNER.SQUEEZE.TASK_LOSSES", value) for value in (True, False))
STAGES = ["res2", "res3", "res4", "res5"]


def plan_of(project: Project, *opts: Any) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
        return make_plan(project.load(*opts), world_size=1)


def hook_of(plan: Plan) -> SqueezeHook:
    return build_squeeze_hook(plan, build_model(plan.cfg).freeze(), [], max_iter=1)


def keep(project: Project, *sources: str) -> None:
    """Leave the others out of the config, and all evaluation."""
    records = project.content["XLEARNER"]["SOURCES"]
    project.content["XLEARNER"]["SOURCES"] = {name: {**records[name], "TEST": []} for name in sources}
    project.write(project.content)


def add_opts(project: Project, source: str, *opts: Any) -> None:
    record = project.content["XLEARNER"]["SOURCES"][source]
    record["OPTS"] = [*record["OPTS"], *opts]
    project.write(project.content)


def end_at(project: Project, stage: str) -> None:
    """Let the classifier read a stage before the last, so that its branch ends there."""
    add_opts(project, "pics", "MODEL.CLASSIFIER.IN_FEATURE", stage, "MODEL.RESNETS.OUT_FEATURES", [stage])


# A whole network


@pytest.mark.parametrize("opts", [LABELS, HINTS], ids=["labels", "hints"])
def test_a_student_of_branches_without_res5_is_a_whole_network(project: Project, opts: tuple[Any, ...]) -> None:
    """Its probe reads res5, which learns from hints, and the file is read as any other student's."""
    keep(project, "pics")
    end_at(project, "res4")
    metrics = project.run(*opts)
    assert "student" in metrics["probes"]["pics"]
    file = project.root / "out/student_d2.pth"
    assert list(load_student(file).network.stage_names) == STAGES
    log = (project.root / "out/log.txt").read_text()
    assert "The student starts as the branch of task classification, and res5, which that has not, at random." in log


@pytest.mark.parametrize("opts", [LABELS, HINTS], ids=["labels", "hints"])
def test_it_starts_as_a_branch_as_far_as_that_goes(project: Project, opts: tuple[Any, ...]) -> None:
    keep(project, "pics", "areas")
    end_at(project, "res3")
    distiller = hook_of(plan_of(project, *opts)).distiller
    student, branch = distiller.student.state_dict(), distiller.teacher.backbone.branch("classification").state_dict()
    assert {name.split(".")[0] for name in branch} == {"stem", "res2", "res3"}
    assert all(torch.equal(student[name], value) for name, value in branch.items())
    assert all(parameter.requires_grad for parameter in distiller.student.parameters())


@pytest.mark.parametrize("depth", [101, 18])
def test_it_does_not_start_as_the_beginning_of_deeper_stages(project: Project, depth: int) -> None:
    """A stage of ResNet-101 begins with blocks of the shapes of ResNet-50's."""
    keep(project, "pics")
    distiller = hook_of(plan_of(project, "XLEARNER.SQUEEZE.DEPTH", depth)).distiller
    branch = distiller.teacher.backbone.branch("classification")
    assert not torch.equal(distiller.student.res3[0].conv1.weight, branch.res3[0].conv1.weight)
    with pytest.raises(ValueError, match=r"INIT is 'classification', but the student is ResNet-.*: set it to random"):
        plan_of(project, "XLEARNER.SQUEEZE.DEPTH", depth, "XLEARNER.SQUEEZE.INIT", "classification")


@pytest.mark.parametrize("opts", [LABELS, HINTS], ids=["labels", "hints"])
def test_a_stage_that_nothing_reaches_is_left_as_it_starts(
    project: Project, opts: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Several workers would wait for its gradient."""
    keep(project, "pics")
    end_at(project, "res4")
    alone = [item for key in ("STAGES", "TEACHER_STAGES") for item in (f"XLEARNER.SQUEEZE.{key}", ["res4"])]
    distiller = hook_of(plan_of(project, *opts, *alone, "XLEARNER.SQUEEZE.STAGE_WEIGHTS", [1.0])).distiller
    frozen = {name.split(".")[0] for name, p in distiller.student.named_parameters() if not p.requires_grad}
    assert frozen == {"res5"}
    assert "res5 of the student gets no hint (XLEARNER.SQUEEZE.STAGES) nor does a head read it" in caplog.text


# Frozen stages of branches

FREEZE = ("MODEL.BACKBONE.FREEZE_AT", 2)


@pytest.mark.parametrize("network", [("DEPTH", 0), ("DEPTH", 18), ("TIMM", "test_convnext")], ids=str)
@pytest.mark.parametrize("labels", [LABELS, HINTS], ids=["labels", "hints"])
def test_no_stage_is_frozen_as_those_of_branches_are(
    project: Project, network: tuple[str, Any], labels: tuple[Any, ...]
) -> None:
    """Neither of a student that starts at random, nor of one that starts as a branch."""
    keep(project, "pics", "areas")
    hook = hook_of(plan_of(project, *FREEZE, *labels, f"XLEARNER.SQUEEZE.{network[0]}", network[1]))
    student, branch = hook.distiller.student, hook.distiller.teacher.backbone.branch("classification")
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in student.modules())
    own = student.state_dict()
    same = [torch.equal(own[name], value) for name, value in branch.state_dict().items() if name in own]
    assert isinstance(branch.stem.conv1.norm, FrozenBatchNorm2d)
    assert (bool(same) and all(same)) == (network == ("DEPTH", 0))


def test_a_run_with_frozen_stages_starts_the_student_from_them(project: Project) -> None:
    keep(project, "pics")
    project.run(*FREEZE, "XLEARNER.SQUEEZE.INIT", "classification")
    expanded, student = (
        read_checkpoint(project.root / "out" / name)["model"] for name in ("expanded.pth", "student_d2.pth")
    )
    start = expanded["backbone.branches.classification.stem.conv1.weight"]
    assert 0 < (student["stem.conv1.weight"] - start).abs().max() < 0.01


# Whose branches give hints

OWN_IMAGES = ("XLEARNER.SQUEEZE.OWN_IMAGES", True)


@pytest.fixture
def grown(project: Project) -> Project:
    """A project that extends an expansion of classes by areas, without images of the classes."""
    keep(project, "pics")
    project.run("XLEARNER.STAGE", "expand", "OUTPUT_DIR", project.root / "old")
    project.content = config(project.root)
    keep(project, "pics", "areas")
    del project.content["XLEARNER"]["SOURCES"]["pics"]["TRAIN"]
    project.content["XLEARNER"] |= {"EXTEND": str(project.root / "old/expanded.pth"), "FREEZE": ["classification"]}
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)
    return project


@pytest.mark.parametrize(("opts", "asked"), [((), {"classification", "segmentation"}), (OWN_IMAGES, {"segmentation"})])
def test_a_branch_whose_images_are_not_drawn_is_asked_only_for_hints_for_others(
    grown: Project, opts: tuple[Any, ...], asked: set[str]
) -> None:
    """A projector that no image reaches would have no gradient."""
    plan = plan_of(grown, *opts)
    hook = build_squeeze_hook(plan, build_model(plan.cfg).freeze(), build_loader(plan, "squeeze"), max_iter=1)
    assert set(hook.distiller.projectors) == asked
    losses = hook.distiller.train()(next(iter(build_loader(plan, "squeeze"))))
    assert {name for name in losses if "hint" in name} == {f"loss_hint_{task}" for task in asked}
    sum(losses.values(), torch.zeros(())).backward()
    assert [name for name, p in hook.distiller.named_parameters() if p.requires_grad and p.grad is None] == []


def test_two_workers_squeeze_the_hints_for_own_images_alone(grown: Project) -> None:
    """More than one step: a missing gradient ends the second."""
    finish(start(grown, "--num-gpus", 2, *OWN_IMAGES, "XLEARNER.SQUEEZE.SOLVER.MAX_ITER", 3))
    assert (grown.root / "out/student_d2.pth").is_file()


def test_hints_for_own_images_that_nobody_gives_are_refused(grown: Project) -> None:
    opts = [*OWN_IMAGES, *HINTS, "XLEARNER.SQUEEZE.TASK_WEIGHTS.segmentation", 0.0]
    with pytest.raises(ValueError, match=r"are 0 for all tasks that have images to train on \(OWN_IMAGES\), so"):
        plan_of(grown, *opts)
    plan_of(grown, *opts[2:])  # branch classification gives hints for the areas


@pytest.mark.parametrize("dilation", [1, 2])
def test_its_file_says_how_far_res5_is_dilated(
    project: Project, monkeypatch: pytest.MonkeyPatch, dilation: int
) -> None:
    """Read back, and where it is probed, it is the network that was trained."""
    keep(project, "pics")
    add_opts(project, "pics", "MODEL.RESNETS.RES5_DILATION", dilation)
    plan = plan_of(project)
    hook, path = hook_of(plan), project.root / "out/student_d2.pth"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    hook.finish()
    probed = []
    monkeypatch.setattr(
        evaluate, "probe_backbone", lambda network, *_, **__: probed.append(network) or Mock(accuracy=0.0)
    )
    probe_student(plan, path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = hook.distiller.student.eval()(images)["res5"]
        assert expected.shape[-1] == (2 if dilation == 1 else 4)
        for network in (load_student(path).network, probed[0]):
            torch.testing.assert_close(network(images)["res5"], expected, rtol=1e-3, atol=1e-3)


# Stages that give hints

SAME_STAGES = ("XLEARNER.SQUEEZE.TEACHER_STAGES", ["res4", "res5"])


@pytest.mark.parametrize("online", [False, True])
def test_hints_across_strides_of_res5_are_refused(project: Project, online: bool) -> None:
    """Branches of two strides can be squeezed without labels, but a hint cannot be coarser than what learns from it."""
    keep(project, "pics", "areas")
    add_opts(project, "pics", "MODEL.RESNETS.RES5_DILATION", 2)
    stage = ("XLEARNER.STAGE", "expand", "XLEARNER.SQUEEZE.ONLINE", True) if online else ()
    message = r"TEACHER_STAGES has res5 for res5 of the student, whose stride is 16, but that of segmentation 32: set"
    with pytest.raises(ValueError, match=message):
        plan_of(project, *stage, *HINTS, *SAME_STAGES)
    for fitting in (
        (),  # the default: res5 learns from res4
        (*SAME_STAGES, "XLEARNER.SQUEEZE.STAGE_WEIGHTS", [1.0, 0.0]),
        (*SAME_STAGES, "XLEARNER.SQUEEZE.TASK_WEIGHTS.segmentation", 0.0),
    ):
        assert hook_of(plan_of(project, *stage, *HINTS, *fitting)).distiller.projectors
    plan_of(project, "XLEARNER.STAGE", "expand", *HINTS, *SAME_STAGES)  # nothing is squeezed


@pytest.mark.parametrize("sharing", ["detached", "shared"])
def test_a_stage_that_no_branch_has_is_refused(project: Project, sharing: str) -> None:
    keep(project, "pics")
    end_at(project, "res3")
    message = r"has res4 for res5 of the student, but no branch that gives hints has it, as no head reads it"
    with pytest.raises(ValueError, match=message):
        plan_of(project, "XLEARNER.SHARING", sharing)
    shallow = ("XLEARNER.SQUEEZE.TEACHER_STAGES", ["res3", "res3"])
    assert list(hook_of(plan_of(project, *shallow)).distiller.projectors["classification"]) == ["res4", "res5"]
    plan_of(project, "XLEARNER.SQUEEZE.HINT_WEIGHT", 0.0)  # labels alone


def test_an_online_student_has_statistics_of_what_it_learned_from(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of sources that give images to an offline squeeze alone, or other shares of them."""
    plan = plan_of(project, "XLEARNER.SQUEEZE.ONLINE", True, "XLEARNER.STAGE", "expand")
    stages: list[str] = []
    monkeypatch.setattr("xlearner_d2.engine.squeeze.build_loader", lambda plan, stage, **_: stages.append(stage))
    build_squeeze_hook(plan, build_model(plan.cfg), [], max_iter=1)
    assert stages == ["expand"]
