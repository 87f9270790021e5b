"""Whole runs on other networks; what cannot work is refused before anything is built, with the setting to change."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Project
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine import trainer
from xlearner_d2.engine.branches import initialise_branches, settle_statistics, student_config
from xlearner_d2.engine.plan import Plan, make_plan
from xlearner_d2.modeling import XLearner
from xlearner_d2.modeling.branches import build_branch
from xlearner_d2.specs import ConfigError

CONVNEXT, EFFICIENTNET = "test_convnext", "test_efficientnet"
GLOBAL, STUDENT = "MODEL.BACKBONE.TIMM", "XLEARNER.SQUEEZE.TIMM"


def weights(path: Path) -> dict[str, Tensor]:
    return read_checkpoint(path)["model"]


def plan_of(project: Project, *opts: Any) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
        return make_plan(project.load(*opts), world_size=1)


def of_task(task: str, key: str) -> str:
    return f"XLEARNER.BRANCHES.{task}.{key}"


def hub_file(path: Path, name: str) -> Path:
    """A file as timm's on the Hugging Face hub."""
    torch.manual_seed(0)
    save_file({key: value.contiguous() for key, value in timm.create_model(name).state_dict().items()}, path)
    return path


def test_branches_of_several_kinds_are_squeezed_into_a_smaller_student(project: Project, tmp_path: Path) -> None:
    """ResNet-50, ResNet-18 and ConvNeXt, started from a file each or none, into EfficientNet, and all of it resumed."""
    file = hub_file(tmp_path / "convnext.safetensors", CONVNEXT)
    opts = [of_task("classification", "TIMM"), CONVNEXT, of_task("classification", "WEIGHTS"), file]
    opts += [of_task("detection", "DEPTH"), 18, STUDENT, EFFICIENTNET]
    text = project.dry_run(*opts)
    assert [name in text for name in (CONVNEXT, "ResNet-18", "ResNet-50")] == [True] * 3
    metrics = project.run(*opts)
    assert set(metrics["probes"]["pics"]) == {"student", "random"}
    log = (project.root / "out/log.txt").read_text()
    assert f"Starting branch classification from {file}" in log
    assert "channels reversed and scaled to MODEL.PIXEL_STD (stem." in log
    student = weights(project.root / "out/student_d2.pth")
    own = build_branch_of(plan_of(project, *opts))
    assert set(student) == {name for name in own.state_dict() if not name.endswith("num_batches_tracked")}
    (project.root / "out/student_d2.pth").unlink()
    project.run(*opts, resume=True)
    again = weights(project.root / "out/student_d2.pth")
    assert all(torch.equal(student[name], again[name]) for name in student)


def build_branch_of(plan: Plan) -> torch.nn.Module:
    return build_branch(student_config(plan.cfg, plan.tasks), out_features=["res5"])


def test_a_student_starts_as_a_branch_of_timm(project: Project) -> None:
    project.run(GLOBAL, CONVNEXT, "XLEARNER.SQUEEZE.INIT", "detection", "XLEARNER.SQUEEZE.TASK_LOSSES", False)
    assert "The student starts as the branch of task detection" in (project.root / "out/log.txt").read_text()


def test_a_task_of_another_network_grows(project: Project, tmp_path: Path) -> None:
    old = ["XLEARNER.STAGE", "expand", "XLEARNER.SOURCES.areas", "null", of_task("detection", "DEPTH"), 18]
    project.run(*old)
    extend = ["XLEARNER.EXTEND", project.root / "out/expanded.pth", "OUTPUT_DIR", tmp_path / "grown"]
    new = [of_task("detection", "DEPTH"), 18, of_task("segmentation", "TIMM"), CONVNEXT]
    file = hub_file(tmp_path / "convnext.safetensors", CONVNEXT)
    project.run("XLEARNER.STAGE", "expand", *extend, *new, of_task("segmentation", "WEIGHTS"), file)
    assert "Branch segmentation starts from" in (tmp_path / "grown/log.txt").read_text()
    with pytest.raises(ConfigError, match=r"task 'detection' is ResNet-50, but ResNet-18 in XLEARNER\.EXTEND"):
        plan_of(project, *extend)
    with pytest.raises(ConfigError, match=r"detection\.WEIGHTS is .* starts as XLEARNER\.EXTEND has it"):
        plan_of(project, *extend, *new, of_task("detection", "WEIGHTS"), file)
    text = project.dry_run(*extend, *new)
    assert "Branch segmentation starts at random, as branch detection is another network." in text


def test_a_frozen_network_of_timm_goes_on_unfrozen(project: Project, tmp_path: Path) -> None:
    """Its frozen norms have no counters, and the trained ones that take their place have."""
    opts = [GLOBAL, "test_resnet", "XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1]
    project.run(*opts, "MODEL.BACKBONE.FREEZE_AT", 2)
    file = project.root / "out/expanded.pth"
    counters = [name for name in weights(file) if name.endswith("num_batches_tracked")]
    areas = project.content["XLEARNER"]["SOURCES"].pop("areas")
    project.write(project.content)
    project.run(*opts, "MODEL.BACKBONE.FREEZE_AT", 2, "OUTPUT_DIR", tmp_path / "fewer")
    project.content["XLEARNER"]["SOURCES"]["areas"] = areas
    project.write(project.content)
    text = project.dry_run(*opts, "MODEL.BACKBONE.FREEZE_AT", 0, "XLEARNER.EXTEND", tmp_path / "fewer/expanded.pth")
    assert "Branch segmentation starts as branch detection." in text
    for freeze_at in (0, 2, 5):
        at = ["MODEL.BACKBONE.FREEZE_AT", freeze_at]
        project.run(*opts, *at, eval_only=True)
        project.run(*opts, *at, "MODEL.WEIGHTS", file, "OUTPUT_DIR", tmp_path / f"again{freeze_at}")
        project.run(*opts, *at, "XLEARNER.EXTEND", file, "OUTPUT_DIR", tmp_path / f"grown{freeze_at}")
    assert counters
    assert len([name for name in weights(tmp_path / "grown0/expanded.pth") if name.endswith("tracked")]) > len(counters)


def test_random_overrides_the_file_of_all_branches(project: Project, tmp_path: Path) -> None:
    file = hub_file(tmp_path / "convnext.safetensors", CONVNEXT)
    opts = [GLOBAL, CONVNEXT, "MODEL.WEIGHTS", file, of_task("detection", "WEIGHTS"), "random"]
    project.run("XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1, *opts)
    log = (project.root / "out/log.txt").read_text()
    assert [f"Starting branch {task} from" in log for task in ("classification", "detection")] == [True, False]


def test_branches_start_as_the_trunk_of_hard_sharing(project: Project, tmp_path: Path) -> None:
    """Each branch then computes what the trunk did, as reconciliation layers start at zero; heads go on as well."""
    stage = ["XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1]
    project.run(*stage, "XLEARNER.SHARING", "shared")
    file = project.root / "out/expanded.pth"
    plan = plan_of(project, *stage, "MODEL.WEIGHTS", file, "OUTPUT_DIR", tmp_path / "branches")
    model = build_model(plan.cfg)
    initialise_branches(model, plan.cfg, plan.branches)
    trunk = weights(file)
    for task in model.backbone.tasks:
        own = model.backbone.branch(task).state_dict()
        assert all(torch.equal(own[name], trunk[f"backbone.branches.trunk.{name}"]) for name in own), task
    heads = {name: value for name, value in model.state_dict().items() if name.startswith("heads.")}
    assert heads
    assert all(torch.equal(value, trunk[name]) for name, value in heads.items())
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    for task in model.backbone.tasks:
        alone = model.backbone.branch(task)(images)
        assert all(torch.equal(of, alone[stage]) for stage, of in model.backbone(images, task).items()), task


def test_a_branch_may_start_anew_where_others_go_on(project: Project, tmp_path: Path) -> None:
    stage = ["XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1]
    project.run(*stage)
    file = project.root / "out/expanded.pth"
    opts = ["MODEL.WEIGHTS", file, of_task("detection", "WEIGHTS"), "random", "OUTPUT_DIR", tmp_path / "again"]
    plan = plan_of(project, *stage, *opts)
    torch.manual_seed(5)
    model = build_model(plan.cfg)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    initialise_branches(model, plan.cfg, plan.branches)
    trained = weights(file)
    for name, value in model.state_dict().items():
        anew = name.startswith("backbone.branches.detection.")
        assert torch.equal(value, (fresh if anew else trained)[name]), name


FILE = "{file}"
#: settings -> message
REFUSED: dict[str, tuple[list[Any], str]] = {
    "unknown network": ([GLOBAL, "convnext_tinny"], r"MODEL\.BACKBONE\.TIMM is 'convnext_tinny': .*Did you mean"),
    "unknown network of a branch": (
        [of_task("detection", "TIMM"), "test_vit"],
        r"BRANCHES\.detection\.TIMM is 'test_vit': timm can run it only as a whole",
    ),
    "unknown network of the student": ([STUDENT, "test_vit"], r"XLEARNER\.SQUEEZE\.TIMM is 'test_vit'"),
    "two networks of a student": (
        [STUDENT, CONVNEXT, "XLEARNER.SQUEEZE.DEPTH", 18],
        r"TIMM 'test_convnext' and DEPTH 18",
    ),
    "unknown depth of all": (["MODEL.RESNETS.DEPTH", 51], r"MODEL\.RESNETS\.DEPTH is 51, but"),
    "unknown depth": (
        [of_task("detection", "DEPTH"), 51],
        r"BRANCHES\.detection\.DEPTH is 51, but 0, 18, 34, 50, 101 or",
    ),
    "unknown task": ([of_task("detektion", "DEPTH"), 18], r"BRANCHES names 'detektion', .* Did you mean 'detection'"),
    "unknown key": ([of_task("detection", "DEEP"), 18], r"BRANCHES\.detection has the unknown key 'DEEP'"),
    "one trunk": ([of_task("detection", "DEPTH"), 18, "XLEARNER.SHARING", "shared"], r"'shared' there is one trunk"),
    "no such file": ([of_task("detection", "WEIGHTS"), "x.pth"], r"WEIGHTS is 'x\.pth', but a file or 'random' is"),
    "file of another network": (
        [of_task("detection", "WEIGHTS"), FILE],
        r"detection\.WEIGHTS is .*convnext\.safetensors holds no ResNet under names of",
    ),
    "file of another network for all": (
        [GLOBAL, EFFICIENTNET, "MODEL.WEIGHTS", FILE],
        r"has 1 problem:\n.*MODEL\.WEIGHTS is .* no test_e",
    ),
    "file of another network for the student": (
        ["XLEARNER.SQUEEZE.INIT", FILE],
        r"SQUEEZE\.INIT is .* holds no ResNet",
    ),
    "branch that the student cannot start as": (
        [STUDENT, CONVNEXT, "XLEARNER.SQUEEZE.INIT", "detection"],
        r"INIT is 'detection', but the student is test_convnext with .* is ResNet-50 with .*: set it to random",
    ),
    "groups in basic blocks": (
        ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NUM_GROUPS", 2],
        r"The branch of task 'detection', ResNeXt-18 .*cannot be built: .*NUM_GROUPS = 1",
    ),
    "layers between branches with a norm that does not fit": (
        [GLOBAL, CONVNEXT, "MODEL.RESNETS.NORM", "GN"],
        r"Reconciliation layers with MODEL\.RESNETS\.NORM 'GN' do not fit these branches: .*divisible",
    ),
    "hints of channels that have no Hadamard matrix": (
        [GLOBAL, CONVNEXT, "XLEARNER.SQUEEZE.NORMALISER", "phi_s"],
        r"TEACHER_STAGES has res4 for res5 of the student, which has \d+ channels, but phi_s needs powers of two",
    ),
    "head with a res5 of its own": (
        [GLOBAL, CONVNEXT, "XLEARNER.SOURCES.boxes.CONFIG", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"],
        r"SOURCES\.boxes .* has res5 of a ResNet in its head .* XLEARNER\.BRANCHES\.<task>\.DEPTH",
    ),
    "head with a res5 of its own, on the student": (
        [STUDENT, CONVNEXT, "XLEARNER.SOURCES.boxes.CONFIG", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"],
        r"The student's head: XLEARNER\.SOURCES\.boxes .* has res5 of a ResNet in its head",
    ),
    "dilated head on a network without dilations": (
        [GLOBAL, "pvt_v2_b0", "XLEARNER.SOURCES.boxes.CONFIG", "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"],
        r"task 'detection': MODEL\.BACKBONE\.TIMM is 'pvt_v2_b0': timm cannot make it .* with a dilated res5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(project: Project, tmp_path: Path, name: str) -> None:
    opts, message = REFUSED[name]
    if FILE in opts:
        file = hub_file(tmp_path / "convnext.safetensors", CONVNEXT)
        opts = [file if opt == FILE else opt for opt in opts]
    if "CONFIG" in message or any("CONFIG" in str(opt) for opt in opts):
        project.content["XLEARNER"]["SOURCES"]["boxes"]["OPTS"] = []
        project.write(project.content)
    with pytest.raises(ConfigError, match=message):
        plan_of(project, *opts)


def test_a_fitting_plan_has_no_problem(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "xlearner_d2")
    plan = plan_of(project, GLOBAL, CONVNEXT, of_task("detection", "DEPTH"), 34)
    assert [spec.depth for spec in plan.branches] == [34]
    assert not caplog.records


def largest(model: XLearner) -> float:
    """What branches send of a smooth image at the first step, before any has learned: the largest number."""
    images = interpolate(255 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=64) - 110
    with torch.no_grad():
        received = model.train().backbone.received([(images, task) for task in model.backbone.tasks])
    return max(float(of.abs().max()) for sources in received for sent in sources.values() for of in sent.values())


@pytest.mark.parametrize("depth", [50, 101])
def test_what_deep_branches_send_before_they_have_learned_fits_into_float16(
    make_model: Callable[..., XLearner], tiny_cfg: CfgNode, depth: int
) -> None:
    model = make_model("MODEL.RESNETS.DEPTH", depth)
    started = next(iter(model.backbone.branches.values()))
    started.stem.conv1.norm.running_mean.fill_(1.0)  # as of a file
    before = {name: value.clone() for name, value in started.state_dict().items()}
    limit = torch.finfo(torch.float16).max
    assert (largest(model) > limit) == (depth == 101)
    settle_statistics(model, tiny_cfg)
    assert all(torch.equal(value, before[name]) for name, value in started.state_dict().items())
    started.stem.conv1.norm.running_mean.zero_()
    settle_statistics(model, tiny_cfg)
    assert largest(model) < limit / 10


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_statistics_are_settled_where_float16_needs_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype
) -> None:
    settled: list[object] = []
    monkeypatch.setattr(trainer, "autocast_dtype", lambda cfg: precision)
    monkeypatch.setattr(trainer, "settle_statistics", lambda model, cfg: settled.append(model))
    project.run("XLEARNER.STAGE", "expand", "SOLVER.MAX_ITER", 1)
    assert len(settled) == (precision == torch.float16)
