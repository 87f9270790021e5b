"""XLEARNER.TRUNK_STEPS: hard sharing first, whose trunk the branches of the same run start as."""

import re
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from test_processes import finish, start
from test_resume import assert_same_results, in_child, killed_at

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine import run, trunk
from xlearner_d2.engine.scaling import scale_to_workers
from xlearner_d2.engine.trainer import expand
from xlearner_d2.specs import ConfigError

FIRST = ("XLEARNER.TRUNK_STEPS", 3)


def shorten(project: Project) -> Project:
    """Training alone, on two sources."""
    del project.content["XLEARNER"]["SOURCES"]["boxes"]
    project.content["XLEARNER"]["PROBES"] = {}
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.write(project.content)
    return project


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run with a trunk first, in the folder ``whole``."""
    project = shorten(Project(tmp_path_factory.mktemp("trunk")))
    project.run(*FIRST, "OUTPUT_DIR", project.root / "whole")
    return project


def test_it_equals_two_runs_by_hand(whole: Project) -> None:
    """Of hard sharing, and of an expansion and a squeeze that start from its file."""
    trunk, hand = whole.root / "trunk", whole.root / "hand"
    shared = ("XLEARNER.STAGE", "expand", "XLEARNER.SHARING", "shared", "SOLVER.MAX_ITER", 3)
    whole.run(*shared, "OUTPUT_DIR", trunk)
    whole.run("MODEL.WEIGHTS", trunk / "expanded.pth", "OUTPUT_DIR", hand)
    assert_same_results(whole, "hand", "whole", "expanded.pth", "student_d2.pth")
    one, other = (
        read_checkpoint(path)["model"] for path in (trunk / "expanded.pth", whole.root / "whole/trunk/expanded.pth")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_it_branches_start_otherwise(whole: Project) -> None:
    whole.run("XLEARNER.STAGE", "expand", "OUTPUT_DIR", whole.root / "none")
    none, first = (read_checkpoint(whole.root / f"{name}/expanded.pth")["model"] for name in ("none", "whole"))
    assert none.keys() == first.keys()
    assert not torch.equal(*(of["backbone.branches.classification.res2.0.conv1.weight"] for of in (none, first)))
    assert not (whole.root / "none/trunk").exists()


def test_a_branch_may_have_a_start_of_its_own(whole: Project) -> None:
    whole.run(
        *FIRST,
        "XLEARNER.STAGE",
        "expand",
        "XLEARNER.BRANCHES.segmentation.WEIGHTS",
        "random",
        "OUTPUT_DIR",
        whole.root / "own",
    )
    log = (whole.root / "own/log.txt").read_text()
    assert "Branch segmentation starts from random weights." in log
    assert "Branch classification starts from random weights." not in log


def test_the_run_tells_of_it(whole: Project) -> None:
    plan = whole.dry_run(*FIRST)
    assert "The plan: a shared trunk for 3 steps, then expand for 2 steps, then squeeze for 2 steps" in plan
    epochs = [
        re.search(r"^pics .*? (\d+\.\d) +1 ", of, re.MULTILINE) for of in (plan, whole.dry_run("SOLVER.MAX_ITER", 5))
    ]
    assert all(epochs)
    assert len({found[1] for found in epochs if found}) == 1, "its steps are counted"
    student = read_checkpoint(whole.root / "whole/student_d2.pth")
    assert str(student["xlearner"]["training"]["steps"]).startswith("3 of a shared trunk, then 2 of expansion, then 2")


def test_an_expansion_and_a_squeeze_of_their_own_tell_of_it(whole: Project) -> None:
    out = whole.root / "apart"
    whole.run(*FIRST, "XLEARNER.STAGE", "expand", "OUTPUT_DIR", out)
    whole.run(*FIRST, "XLEARNER.STAGE", "squeeze", "OUTPUT_DIR", out)
    assert_same_results(whole, "whole", "apart", "expanded.pth", "student_d2.pth")
    one, other = (read_checkpoint(of / "student_d2.pth")["xlearner"]["training"] for of in (out, whole.root / "whole"))
    assert one["steps"] == other["steps"]


def test_an_online_squeeze_begins_after_it(whole: Project) -> None:
    whole.run(
        *FIRST, "XLEARNER.SQUEEZE.ONLINE", True, "XLEARNER.SQUEEZE.EMA_DECAY", 0.9, "OUTPUT_DIR", whole.root / "online"
    )
    expanded, student = (
        read_checkpoint(whole.root / path)["model"] for path in ("online/expanded.pth", "online/student_d2.pth")
    )
    first = read_checkpoint(whole.root / "whole/expanded.pth")["model"]
    assert all(torch.equal(expanded[name], first[name]) for name in first)
    assert student.keys() == read_checkpoint(whole.root / "whole/student_d2.pth")["model"].keys()
    assert not (whole.root / "online/trunk/student_d2.pth").exists()


def test_the_trunk_starts_from_a_file(whole: Project) -> None:
    """That of a network; what then is changed by no step shows whether it was read."""
    student = whole.root / "whole/student_d2.pth"
    still = ("SOLVER.BASE_LR", 1e-12, "XLEARNER.STAGE", "expand", "OUTPUT_DIR", whole.root / "file")
    whole.run(*FIRST, "MODEL.WEIGHTS", student, *still)
    wanted, name = read_checkpoint(student)["model"], "res2.0.conv1.weight"
    for path, branch in (("trunk/expanded.pth", "trunk"), ("expanded.pth", "classification")):
        found = read_checkpoint(whole.root / "file" / path)["model"]
        assert torch.allclose(found[f"backbone.branches.{branch}.{name}"], wanted[name], atol=1e-6), path


def test_of_the_trunk_nothing_is_left_in_memory(whole: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def noted(plan: Any, **options: Any) -> Any:
        counts.append(sum(model() is not None for model in alive))
        model = expand(plan, **options)
        alive.append(weakref.ref(model))
        return model

    for module in (trunk, run):
        monkeypatch.setattr(module, "expand", noted)
    whole.run(*FIRST, "XLEARNER.STAGE", "expand", "OUTPUT_DIR", whole.root / "memory")
    assert counts == [0, 0]


@pytest.mark.parametrize("count", [2, 4, 6])  # in the trunk, the expansion, the squeeze
def test_a_killed_run_resumes_exactly(whole: Project, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    out = ("OUTPUT_DIR", whole.root / f"killed_{count}")
    with monkeypatch.context() as patch:
        killed_at(patch, "step", count)
        assert in_child(lambda: whole.run(*FIRST, *out)) == -signal.SIGKILL
    with pytest.raises(ConfigError, match=r"trunk is not empty. Add --resume"):
        whole.run(*FIRST, *out)
    assert in_child(lambda: whole.run(*FIRST, *out, resume=True)) == 0
    assert_same_results(whole, "whole", f"killed_{count}", "expanded.pth", "student_d2.pth")
    assert_same_results(whole, "whole/trunk", f"killed_{count}/trunk", "expanded.pth")  # and its metrics


def test_two_workers_start_from_one_trunk(whole: Project) -> None:
    """As they do by hand."""

    def in_two(*opts: Any) -> None:
        finish(start(whole, "--num-gpus", 2, "XLEARNER.STAGE", "expand", *opts))

    trunk, hand = whole.root / "trunk_of_two", whole.root / "hand_of_two"
    in_two(*FIRST, "OUTPUT_DIR", whole.root / "two")
    in_two("XLEARNER.SHARING", "shared", "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", trunk)
    in_two("MODEL.WEIGHTS", trunk / "expanded.pth", "OUTPUT_DIR", hand)
    assert_same_results(whole, "hand_of_two", "two", "expanded.pth")


def test_a_finished_expansion_needs_no_trunk_any_more(whole: Project) -> None:
    out = ("XLEARNER.STAGE", "expand", "OUTPUT_DIR", whole.root / "done")
    whole.run(*FIRST, *out)
    shutil.rmtree(whole.root / "done/trunk")
    whole.run(*FIRST, *out, resume=True)
    assert not (whole.root / "done/trunk").exists()


def test_an_expansion_that_has_begun_keeps_its_start(whole: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("OUTPUT_DIR", whole.root / "begun")
    with monkeypatch.context() as patch:
        killed_at(patch, "step", 2)
        assert in_child(lambda: whole.run(*out)) == -signal.SIGKILL
    for _ in range(2):  # begun, then done
        with pytest.raises(ConfigError, match=r"XLEARNER.TRUNK_STEPS is 3, but the run in .* has 0"):
            whole.run(*FIRST, *out, resume=True)
        whole.run(*out, resume=True)


def test_an_expansion_that_has_begun_needs_the_trunk_no_more(whole: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("OUTPUT_DIR", whole.root / "lost")
    with monkeypatch.context() as patch:
        killed_at(patch, "step", 5)  # the second one of the expansion
        assert in_child(lambda: whole.run(*FIRST, *out)) == -signal.SIGKILL
    shutil.rmtree(whole.root / "lost/trunk")
    whole.run(*FIRST, *out, resume=True)
    assert not (whole.root / "lost/trunk").exists()
    assert_same_results(whole, "whole", "lost", "expanded.pth", "student_d2.pth")


def test_it_is_scaled_with_the_workers(whole: Project) -> None:
    cfg = whole.load("XLEARNER.TRUNK_STEPS", 8, "SOLVER.REFERENCE_WORLD_SIZE", 1)
    assert scale_to_workers(cfg, 2).XLEARNER.TRUNK_STEPS == 4


@pytest.mark.parametrize(
    ("opts", "problem"),
    [
        (["XLEARNER.TRUNK_STEPS", -1], r"TRUNK_STEPS is -1, but a number of steps is expected, or 0 for no trunk"),
        ([*FIRST, "XLEARNER.SHARING", "shared"], r"TRUNK_STEPS is 3, .* no expansion after them: set SOLVER.MAX_ITER"),
        ([*FIRST, "XLEARNER.EXTEND", "{whole}/expanded.pth"], r"TRUNK_STEPS is 3, .*EXTEND names branches that are"),
        (
            [*FIRST, "MODEL.WEIGHTS", "{whole}/expanded.pth"],
            r"expanded.pth', an expanded model without a trunk for the trunk to start as",
        ),
        (
            ["XLEARNER.SHARING", "shared", "MODEL.WEIGHTS", "{whole}/expanded.pth"],
            r"expanded.pth', an expanded model without a trunk for the trunk to start as",
        ),
        (
            [*FIRST, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(3,)", "SOLVER.MAX_ITER", 9],
            r"SOLVER, with as many steps as XLEARNER.TRUNK_STEPS, is refused by Detectron2 or PyTorch",
        ),
        (
            [*FIRST, "XLEARNER.BRANCHES.segmentation.DEPTH", 34],
            r"BRANCHES.segmentation is ResNet-34, but with XLEARNER.TRUNK_STEPS all branches .*, ResNet-50",
        ),
        (
            [*FIRST, "XLEARNER.SQUEEZE.TASK_LOSSES", False, "XLEARNER.SOURCES.pics.OPTS", "{opts}"],
            r"The trunk has one res5, but the heads .* in the OPTS of their sources, or XLEARNER.TRUNK_STEPS to 0",
        ),
    ],
)
def test_what_does_not_go_with_it(whole: Project, opts: list[Any], problem: str) -> None:
    own = [*whole.content["XLEARNER"]["SOURCES"]["pics"]["OPTS"], "MODEL.RESNETS.RES5_DILATION", 2]
    filled = [str(opt).format(whole=whole.root / "whole", opts=own) for opt in opts]
    with pytest.raises(ConfigError, match=problem):
        whole.run(*filled, "OUTPUT_DIR", whole.root / "refused")
    assert not Path(whole.root / "refused").exists()
