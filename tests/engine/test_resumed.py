"""Settings that change while a run lasts: told, or refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from detectron2.config import CfgNode

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine.plan import Plan, check_output, make_plan
from xlearner_d2.engine.resumed import check_unchanged, keep_config
from xlearner_d2.specs import ConfigError


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of one source in the folder ``out``, whose expansion is done."""
    project = Project(tmp_path_factory.mktemp("resumed"))
    pics = project.content["XLEARNER"]["SOURCES"]["pics"] | {"TEST": []}
    project.content["XLEARNER"] |= {"SOURCES": {"pics": pics}, "PROBES": {}, "STAGE": "expand"}
    project.write(project.content)
    project.run()
    return project


def test_changes_are_told_once(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    changes = ["SOLVER.BASE_LR", 0.5, "XLEARNER.SOURCES.pics.LOSS_WEIGHT", 2.0]
    for said in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            project.run(*changes, resume=True)
        told = "SOLVER.BASE_LR is 0.5, was 0.001; XLEARNER.SOURCES.pics.LOSS_WEIGHT is 2.0, was None."
        assert (told in caplog.text) is said


@pytest.mark.parametrize("dry", [False, True])
def test_what_checkpoints_are_made_of_stays(project: Project, dry: bool) -> None:
    """The config that is kept is still that of the run."""
    kept = Path(project.root / "out/config.yaml").read_text()
    changes = ["MODEL.RESNETS.DEPTH", 101, "XLEARNER.SHARING", "bidirectional", "XLEARNER.WEIGHTING.METHOD", "dwa"]
    with pytest.raises(ConfigError) as caught:
        project.run(*changes, resume=True, dry_run=dry)
    wish = f"but the run in {project.root}/out has {{!r}}. Set it so, or another OUTPUT_DIR."
    assert caught.value.problems == [
        f"MODEL.RESNETS.DEPTH is 101, {wish.format(50)}",
        f"XLEARNER.SHARING is 'bidirectional', {wish.format('detached')}",
        f"XLEARNER.WEIGHTING.METHOD is 'dwa', {wish.format('fixed')}",
    ]
    assert Path(project.root / "out/config.yaml").read_text() == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.BACKBONE.TIMM", "test_resnet"),
        ("XLEARNER.SHARING", "separate"),
        ("XLEARNER.RECONCILIATION.CROSS_SCALE", False),
        ("XLEARNER.FREEZE", ["classification"]),
        ("XLEARNER.WEIGHTING.METHOD", "dwa"),
        ("SOLVER.OPTIMIZER", "SGD"),
    ],
)
def test_every_setting_that_stays(project: Project, tmp_path: Path, name: str, value: Any) -> None:
    keep_config(project.load("OUTPUT_DIR", tmp_path))
    assert check_unchanged(project.load("OUTPUT_DIR", tmp_path, "SOLVER.BASE_LR", 0.5)) == []
    (problem,) = check_unchanged(project.load("OUTPUT_DIR", tmp_path, name, value))
    assert problem.startswith(f"{name} is {value!r}, but the run in {tmp_path} has ")


def test_the_order_of_sources_stays(project: Project, tmp_path: Path) -> None:
    """What the optimiser remembers is restored by position."""

    def ordered(*names: str) -> CfgNode:
        cfg = project.load("OUTPUT_DIR", tmp_path)
        cfg.defrost()
        cfg.XLEARNER.SOURCES = CfgNode({name: cfg.XLEARNER.SOURCES.pics.clone() for name in names})
        return cfg

    keep_config(ordered("b", "a"))
    assert check_unchanged(ordered("b", "a")) == []
    (problem,) = check_unchanged(ordered("a", "b"))
    wish = f"but the run in {tmp_path} has 'b, a'. Set it so, or another OUTPUT_DIR."
    assert problem == f"The order of XLEARNER.SOURCES is 'a, b', {wish}"
    (tmp_path / "config.yaml").write_text("VERSION: 2\n")  # of another program
    assert not [text for text in check_unchanged(ordered("a", "b")) if text.startswith("The order")]


def test_the_optimiser_of_a_squeeze_that_has_begun_stays(project: Project) -> None:
    other = plan_of(project, "XLEARNER.STAGE", "all", "XLEARNER.SQUEEZE.SOLVER.OPTIMIZER", "SGD")
    check_output(other, resume=True)  # not begun
    (project.root / "out/squeeze").mkdir()
    with pytest.raises(ConfigError, match=r"SOLVER\.OPTIMIZER is 'SGD', but the run in .*out has 'AdamW'\. Set it so"):
        check_output(other, resume=True)
    check_output(plan_of(project, "XLEARNER.STAGE", "all", "XLEARNER.SQUEEZE.SOLVER.OPTIMIZER", "AdamW"), resume=True)
    (project.root / "out/squeeze").rmdir()


def test_an_expansion_that_has_begun_keeps_its_student_or_has_none(project: Project, tmp_path: Path) -> None:
    cfg = project.load("OUTPUT_DIR", tmp_path)
    keep_config(cfg)
    (tmp_path / "expand").mkdir()
    other = plan_of(project, "OUTPUT_DIR", tmp_path, "XLEARNER.SQUEEZE.ONLINE", True)
    with pytest.raises(ConfigError, match=r"SQUEEZE\.ONLINE is True, but the run in .* has False\. Set it so"):
        check_output(other, resume=True)
    check_output(plan_of(project, "OUTPUT_DIR", tmp_path), resume=True)
    shutil.copyfile(project.root / "out/expanded.pth", tmp_path / "expanded.pth")
    with pytest.raises(ConfigError, match=r"SQUEEZE\.ONLINE is True"):  # too late
        check_output(other, resume=True)
    shutil.copyfile(project.root / "out/expanded.pth", tmp_path / "student_d2.pth")
    check_output(other, resume=True)  # all is done


def test_a_student_of_another_teacher_is_not_taken_for_done(project: Project, tmp_path: Path) -> None:
    (project.root / "out/squeeze").mkdir()
    shutil.copyfile(project.root / "out/expanded.pth", tmp_path / "other.pth")
    both = ["XLEARNER.STAGE", "all", "XLEARNER.SQUEEZE.TEACHER"]
    with pytest.raises(ConfigError, match=r"TEACHER is '.*other\.pth', but the squeeze in .*out has '': set it so"):
        check_output(plan_of(project, *both, tmp_path / "other.pth"), resume=True)
    check_output(plan_of(project, *both, project.root / "out/expanded.pth"), resume=True)  # the same one
    (project.root / "out/squeeze").rmdir()


def plan_of(project: Project, *opts: Any) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
        return make_plan(project.load(*opts), world_size=1)


def test_a_run_without_tests_says_so(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        project.run(resume=True)
    assert "The expanded model is not evaluated, as no source has TEST." in caplog.text
    assert "Pictures" not in caplog.text


def test_rates_and_decays_that_are_changed_hold(project: Project) -> None:
    """The rest of both stages, which are stopped after two steps, has those of now."""
    out = ("OUTPUT_DIR", project.root / "changed", "XLEARNER.STAGE", "all")
    project.run(*out)
    for name in ("expanded.pth", "student_d2.pth"):
        (project.root / "changed" / name).unlink()
    steps = (
        "SOLVER.MAX_ITER",
        4,
        "XLEARNER.SQUEEZE.SOLVER.MAX_ITER",
        4,
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
    )
    project.run(*out, *steps, "SOLVER.BASE_LR", 1e-5, "SOLVER.WEIGHT_DECAY", 0.01, resume=True)
    for stage in ("expand", "squeeze"):
        folder = project.root / "changed" / stage
        assert json.loads((folder / "metrics.json").read_text().splitlines()[-1])["lr"] == pytest.approx(1e-5)
        trainer = read_checkpoint(folder / "model_final.pth")["trainer"]
        groups = (trainer if stage == "expand" else trainer["hooks"]["SqueezeHook"])["optimizer"]["param_groups"]
        assert {group["weight_decay"] for group in groups} == {0.01, 0.0}
