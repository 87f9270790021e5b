"""The squeeze stage with XLEARNER.SQUEEZE.TASK_LOSSES: heads of its own, exact resume, nothing of them exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from detectron2.modeling import build_model
from torch import Tensor

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine.plan import Plan, make_plan
from xlearner_d2.engine.squeeze import SqueezeHook, build_squeeze_hook, load_teacher
from xlearner_d2.engine.student import build_learner
from xlearner_d2.engine.trainer import build_loader
from xlearner_d2.modeling.expanded import TRUNK
from xlearner_d2.specs import ConfigError

LABELS = ("XLEARNER.SQUEEZE.TASK_LOSSES", True)
HINTS = ("XLEARNER.SQUEEZE.TASK_LOSSES", False)
TASKS = ("classification", "detection", "segmentation")
NO_HINTS = [item for task in TASKS for item in (f"XLEARNER.SQUEEZE.TASK_WEIGHTS.{task}", 0.0)]


def weights(path: Path) -> dict[str, Tensor]:
    return read_checkpoint(path)["model"]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An expanded model, and a student of two steps that learnt from labels, too."""
    project = Project(tmp_path_factory.mktemp("finished"))
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)
    project.run(*LABELS)
    return project


def plan_of(project: Project, *opts: Any) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
        return make_plan(project.load(*LABELS, *opts), world_size=1)


def hook_of(project: Project, *opts: Any) -> SqueezeHook:
    plan = plan_of(project, *opts)
    return build_squeeze_hook(plan, load_teacher(plan), build_loader(plan, "squeeze"), max_iter=2)


def squeezed(project: Project, out: Path, *opts: Any, resume: bool = False) -> dict[str, Tensor]:
    """The student of another squeeze of the same teacher."""
    teacher = ("XLEARNER.SQUEEZE.TEACHER", project.root / "out/expanded.pth")
    project.run("XLEARNER.STAGE", "squeeze", "OUTPUT_DIR", out, *teacher, *opts, resume=resume)
    return weights(out / "student_d2.pth")


def test_losses_of_labels_are_logged_with_the_hints(finished: Project) -> None:
    last = logged(finished.root / "out/squeeze/metrics.json")
    assert {"loss_hint_detection", "pics/loss_cls", "boxes/loss_mask", "areas/loss_sem_seg"} <= last.keys()
    assert last["total_loss"] == pytest.approx(sum(value for name, value in last.items() if "loss_" in name), rel=1e-4)


def test_labels_reach_the_student(finished: Project, tmp_path: Path) -> None:
    labels = weights(finished.root / "out/student_d2.pth")
    for out, opts in (("hints", HINTS), ("half", (*LABELS, "XLEARNER.SQUEEZE.HINT_WEIGHT", 0.5))):
        other = squeezed(finished, tmp_path / out, *opts)
        assert other.keys() == labels.keys()
        assert not torch.equal(other["stem.conv1.weight"], labels["stem.conv1.weight"])


def test_the_student_is_a_backbone_and_nothing_else(finished: Project) -> None:
    student = weights(finished.root / "out/student_d2.pth")
    assert {name.split(".")[0] for name in student} == {"stem", "res2", "res3", "res4", "res5"}


def test_resumed_squeeze_ends_with_the_same_weights(finished: Project, tmp_path: Path) -> None:
    """It loses its last step and its result, as if it had been stopped before them."""
    out = tmp_path / "out"
    whole = squeezed(finished, out, *LABELS)
    heads = read_checkpoint(out / "squeeze/model_final.pth")
    (out / "student_d2.pth").unlink()
    (out / "squeeze/model_final.pth").unlink()
    (out / "squeeze/last_checkpoint").write_text("model_0000000.pth")
    assert same(squeezed(finished, out, *LABELS, resume=True), whole)
    again = read_checkpoint(out / "squeeze/model_final.pth")
    states = [_distiller_state(found) for found in (heads, again)]
    assert any(name.startswith("heads.boxes.") for name in states[0])
    assert same(*states)


def _distiller_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    (hook,) = [state for state in checkpoint["trainer"]["hooks"].values() if "distiller" in state]
    return hook["distiller"]


def test_a_checkpoint_with_heads_is_not_resumed_without(finished: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    squeezed(finished, out, *LABELS)
    (out / "student_d2.pth").unlink()
    with pytest.raises(ValueError, match=r"squeeze stage's checkpoint does not fit .*\n.*heads\..* is unexpected"):
        squeezed(finished, out, *HINTS, resume=True)


def test_heads_start_as_the_teachers(finished: Project) -> None:
    hook = hook_of(finished)
    teacher = hook.distiller.teacher
    for source in ("pics", "boxes", "areas"):
        assert same(hook.distiller.heads[source].state_dict(), teacher.heads[source].state_dict())
    own = {id(p) for p in hook.distiller.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    assert own == {id(p) for group in hook.inner.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("bf16", [True, False])
def test_a_teacher_is_kept_in_the_precision_of_its_hints(
    finished: Project, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """What starts as part of it starts as it was saved; an online one still learns, and needs its float32."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    hook = hook_of(finished, "SOLVER.AMP.ENABLED", True)
    saved = read_checkpoint(finished.root / "out/expanded.pth")["model"]
    backbone = hook.distiller.teacher.backbone
    assert backbone.branch("detection").stem.conv1.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    start = hook.distiller.student.state_dict()
    assert all(torch.equal(value, saved[f"backbone.branches.classification.{name}"]) for name, value in start.items())
    assert all(parameter.dtype == torch.float32 for parameter in hook.distiller.parameters())
    plan = plan_of(finished, "SOLVER.AMP.ENABLED", True, "XLEARNER.SQUEEZE.ONLINE", True)
    learning = build_model(plan.cfg)
    build_squeeze_hook(plan, learning, build_loader(plan, "expand"), max_iter=2)
    assert all(parameter.dtype == torch.float32 for parameter in learning.parameters())


def test_heads_start_as_far_as_shapes_allow(finished: Project) -> None:
    """A shallower student has other channels: what reads them starts afresh, the rest is the teacher's."""
    plan = plan_of(finished, "XLEARNER.SQUEEZE.DEPTH", 18)
    teacher = load_teacher(plan)
    learner = build_learner(plan, teacher, "squeeze")
    assert learner.backbone.branch(TRUNK).output_shape()["res5"].channels == 512
    own, taught = learner.heads["boxes"].state_dict(), teacher.heads["boxes"].state_dict()
    equal = {name for name in own if own[name].shape == taught[name].shape}
    assert {name for name in own.keys() - equal if ".fpn_lateral" not in name} == set()
    assert all(torch.equal(own[name], taught[name]) for name in equal)
    assert learner.heads["pics"].linear.in_features == 512


def test_without_task_losses_there_are_no_heads(finished: Project) -> None:
    hook = hook_of(finished, "XLEARNER.SQUEEZE.TASK_LOSSES", False)
    assert hook.distiller.learner is None
    assert not [name for name in hook.distiller.state_dict() if name.startswith("heads.")]


def test_hint_weight_is_that_of_the_config(finished: Project) -> None:
    batches = next(iter(build_loader(plan_of(finished), "squeeze")))
    losses = []
    for weight in (1.0, 4.0):
        torch.manual_seed(0)
        hook = hook_of(finished, "XLEARNER.SQUEEZE.HINT_WEIGHT", weight)
        losses.append(hook.distiller.eval()(batches))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], 4 * loss)


def test_hints_of_a_task_weigh_as_the_config_says(finished: Project) -> None:
    batches = next(iter(build_loader(plan_of(finished), "squeeze")))
    losses = []
    for opts in ((), ("XLEARNER.SQUEEZE.TASK_WEIGHTS.detection", 4.0)):
        torch.manual_seed(0)
        losses.append(hook_of(finished, *opts).distiller.eval()(batches))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss * (4 if name == "loss_hint_detection" else 1))


@pytest.mark.parametrize("own_images", [False, True])
def test_branches_without_weight_are_not_asked(finished: Project, own_images: bool) -> None:
    opts = ("XLEARNER.SQUEEZE.TASK_WEIGHTS.detection", 0.0, "XLEARNER.SQUEEZE.OWN_IMAGES", own_images)
    distiller = hook_of(finished, *opts).distiller.eval()
    last = distiller.teacher.backbone.branch("detection").res5
    last.register_forward_hook(lambda *_: pytest.fail("the last stage of detection was run"))
    losses = distiller(next(iter(build_loader(plan_of(finished), "squeeze"))))
    assert {name for name in losses if name.startswith("loss_hint")} == {
        "loss_hint_classification",
        "loss_hint_segmentation",
    }
    assert "detection" not in distiller.projectors


def test_online_squeeze_logs_the_students_heads_apart(finished: Project, tmp_path: Path) -> None:
    """Both models have heads of the same names; the expansion's results are those it has without a student."""
    out = tmp_path / "online"
    finished.run(*LABELS, "XLEARNER.SQUEEZE.ONLINE", True, "OUTPUT_DIR", out)
    last = logged(out / "expand/metrics.json")
    for name in ("boxes/loss_mask", "boxes/roi_head/num_fg_samples"):
        assert {name, f"squeeze/{name}"} <= last.keys()
    assert "squeeze/loss_hint_detection" in last
    assert same(weights(out / "expanded.pth"), weights(finished.root / "out/expanded.pth"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TASK_LOSSES", "perhaps", "TASK_LOSSES"),
        ("HINT_WEIGHT", "much", "HINT_WEIGHT"),
        ("HINT_WEIGHTS", 1.0, r"There is no setting XLEARNER\.SQUEEZE\.HINT_WEIGHTS .* Did you mean 'HINT_WEIGHT'"),
    ],
)
def test_ill_typed_settings_are_refused(finished: Project, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(finished, f"XLEARNER.SQUEEZE.{key}", value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ("XLEARNER.SQUEEZE.PROJECTOR_LAYERS", 0),
            r"PROJECTOR_LAYERS is 0, but at least 1 is expected",
        ),
        (
            ("XLEARNER.SQUEEZE.HINT_WEIGHT", -1.0),
            r"HINT_WEIGHT is -1\.0, but a finite number of at least 0 is expected",
        ),
        (
            ("XLEARNER.SQUEEZE.HINT_WEIGHT", 0.0, "XLEARNER.SQUEEZE.TASK_LOSSES", False),
            r"HINT_WEIGHT is 0, so the student learns nothing unless TASK_LOSSES is True",
        ),
        (
            ("XLEARNER.SQUEEZE.TASK_WEIGHTS.detection", -1.0),
            r"TASK_WEIGHTS\.detection is -1\.0, but a finite number of at least 0 is expected",
        ),
        (
            ("XLEARNER.SQUEEZE.TASK_WEIGHTS.detecton", 1.0),
            r"TASK_WEIGHTS names the unknown task 'detecton'.* Did you mean 'detection'",
        ),
        (
            (*HINTS, *NO_HINTS),
            r"TASK_WEIGHTS are 0 for all tasks, so the student learns nothing unless TASK_LOSSES is True",
        ),
        (
            ("XLEARNER.SQUEEZE.STAGES", ["res5"]),
            r"SQUEEZE\.TEACHER_STAGES has 2 entries, but SQUEEZE\.STAGES has 1\."
            r"(.|\n)*SQUEEZE\.STAGE_WEIGHTS has 2 entries, but SQUEEZE\.STAGES has 1\.",
        ),
        (
            ("XLEARNER.SQUEEZE.TEACHER_STAGES", ["res5", "res4"]),
            r"TEACHER_STAGES has res5 for res4 of the student, but the same stage or a shallower one is expected",
        ),
        (
            ("XLEARNER.SQUEEZE.STAGES", ["res5", "res5"]),
            r"SQUEEZE\.STAGES names res5 more than once, but a stage learns from one of the branches' stages",
        ),
        (
            ("XLEARNER.SQUEEZE.STAGE_WEIGHTS", [-1.0, 1.0]),
            r"STAGE_WEIGHTS is \[-1\.0, 1\.0\], but finite numbers of at least 0 are expected",
        ),
        (
            (*HINTS, "XLEARNER.SQUEEZE.STAGE_WEIGHTS", [0.0, 0.0]),
            r"STAGE_WEIGHTS is \[0\.0, 0\.0\], so the student learns nothing unless TASK_LOSSES is True",
        ),
        (
            (
                *(*HINTS, "XLEARNER.SQUEEZE.TASK_WEIGHTS.detection", 0.0),
                *("XLEARNER.SQUEEZE.OWN_IMAGES", True, "XLEARNER.STEPS", "alternating"),
            ),
            r"nothing is learned from the steps of task 'detection', whose branch gives no hint\. Set TASK_LOSSES",
        ),
        (("XLEARNER.SQUEEZE.TEACHER_STAGES", ["res4", "res6"]), r"TEACHER_STAGES is 'res6'\. Did you mean"),
        (("XLEARNER.SQUEEZE.EMA_DECAY", 1.0), r"EMA_DECAY is 1\.0, but 0 to below 1 is expected"),
        (
            ("XLEARNER.SQUEEZE.EMA_DECAY", 0.9, "XLEARNER.SQUEEZE.BN_RECALIBRATION_BATCHES", 0),
            r"averaged weights need statistics of their own: set XLEARNER\.SQUEEZE\.BN_RECALIBRATION_BATCHES above 0",
        ),
        (("XLEARNER.WANDB", "birds"), r"XLEARNER\.WANDB is 'birds', but the package wandb is not installed"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(
    finished: Project, opts: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(finished, *opts)


def test_a_branch_gives_hints_from_stages_that_its_heads_do_not_read(finished: Project) -> None:
    """The classifier reads res5 alone, and its res4 gives hints by default."""
    own = ("XLEARNER.SQUEEZE.OWN_IMAGES", True, "XLEARNER.STEPS", "alternating")
    plan_of(finished, *HINTS, *own)
    deep = [item for key in ("STAGES", "TEACHER_STAGES") for item in (f"XLEARNER.SQUEEZE.{key}", ["res5"])]
    deep += ["XLEARNER.SQUEEZE.STAGE_WEIGHTS", [1.0]]
    shallow = ["MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.CLASSIFIER.IN_FEATURE", "res4"]
    with pytest.raises(ConfigError, match="steps of task 'classification', whose branch gives no hint"):
        plan_of(finished, *HINTS, *own, *deep, "XLEARNER.SOURCES.pics.OPTS", shallow)
