"""A loss that is not finite stops either stage, leaves the step in a file, and can be run again from it."""

import dataclasses
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Project
from detectron2.utils import comm
from processes import LONG, Processes
from torch import nn

from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.data.mappers import SourceMapper
from xlearner_d2.engine.failure import guilty_sources, read_failure, wrong_sources
from xlearner_d2.engine.replay import replay
from xlearner_d2.engine.steps import NonFiniteLoss, running_statistics
from xlearner_d2.engine.stopping import RunStopped
from xlearner_d2.engine.workers import work
from xlearner_d2.specs import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An expansion of two kinds of sources without tests."""
    project = Project(tmp_path_factory.mktemp("failure"))
    del project.content["XLEARNER"]["SOURCES"]["boxes"]
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"] |= {"PROBES": {}, "STAGE": "expand"}
    project.content["SOLVER"] |= {"MAX_ITER": STEPS, "CHECKPOINT_PERIOD": 2}
    project.write(project.content)
    project.run()
    return project


def spoil(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Make the images of the areas infinite, from the ``after``-th that is read on."""
    real, left = SourceMapper.__call__, [after]

    def call(self: SourceMapper, record: Any, seed: int) -> Any:
        found = real(self, record, seed)
        if self.source == "areas":
            left[0] -= 1
            if left[0] < 0:
                found["image"] = found["image"].float() * float("inf")
        return found

    monkeypatch.setattr(SourceMapper, "__call__", call)


@pytest.mark.parametrize(
    ("stage", "amp", "method", "readers"),
    [
        ("expand", False, "fixed", 0),
        ("expand", False, "fixed", 1),
        ("expand", False, "dwa", 0),
        ("squeeze", False, "fixed", 0),
        ("squeeze", True, "fixed", 1),
    ],
)
def test_a_failed_step_is_kept_and_fails_again(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    amp: bool,
    method: str,
    readers: int,
) -> None:
    """The trial of the plan reads two images, and a step two, so that step 1 is the first with a spoilt one."""
    out = project.root / f"failed_{stage}_{amp}_{method}_{readers}"
    opts: list[Any] = ["XLEARNER.STAGE", stage, "OUTPUT_DIR", out]
    opts += ["XLEARNER.SQUEEZE.TEACHER", project.root / "out/expanded.pth", "SOLVER.CHECKPOINT_PERIOD", 1]
    opts += [
        "DATALOADER.NUM_WORKERS",
        readers,
        "XLEARNER.SQUEEZE.HINT_WEIGHT",
        0.5,
        "SOLVER.AMP.ENABLED",
        amp,
        "XLEARNER.WEIGHTING.METHOD",
        method,
    ]
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: amp)
    with monkeypatch.context() as patch:
        spoil(patch, after=4)
        with pytest.raises(RunStopped) as caught:
            project.run(*opts)
    file = out / f"{stage}/failed_step_0000001_worker_0.pth"
    message = caught.value.message
    assert caught.value.code == 1
    assert f"Stage {stage}, step 1 (of source areas): The loss of step 1 is not finite: " in message
    assert f"The batch and the weights are in {file}: run tools/replay.py on it" in message
    failure = read_failure(file)
    assert [record["source"] for record in failure.batch["pics"]] == ["pics", "pics"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(project.root / "data"))
    result = replay(failure)
    assert result.losses.keys() == failure.losses.keys()
    for name, value in failure.losses.items():
        assert result.losses[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    assert replay_command(monkeypatch, file) == 1
    text = capsys.readouterr().out
    assert "areas/loss_sem_seg" in text.split("Not finite:")[1]
    assert "stem.conv1" in text.split("begins in")[1]
    assert "areas/images/" in text
    with pytest.raises(ConfigError, match=r"is of another version.*XLEARNER\.OLD"):
        replay(dataclasses.replace(failure, config=failure.config.replace("XLEARNER:\n", "XLEARNER:\n  OLD: 1\n", 1)))
    saved = read_checkpoint(out / f"{stage}/model_0000000.pth")["model"]
    kept = failure.models["expand" if stage == "expand" else "squeeze"]
    prefix = "student." if stage == "squeeze" else "model." if method == "dwa" else ""
    assert all(torch.equal(value, kept[prefix + name]) for name, value in saved.items())


@pytest.mark.parametrize(("stage", "norm"), [("expand", "BN"), ("expand", "naiveSyncBN"), ("squeeze", "BN")])
def test_two_workers_keep_what_failed_and_end(project: Project, tmp_path: Path, stage: str, norm: str) -> None:
    """One has a spoilt image; where statistics are exchanged in the forward pass, both have losses that are none."""
    opts: list[Any] = ["XLEARNER.STAGE", stage, "OUTPUT_DIR", tmp_path, "MODEL.RESNETS.NORM", norm]
    opts += ["XLEARNER.SQUEEZE.TEACHER", project.root / "out/expanded.pth"]

    def start(rank: int) -> None:
        meeting = f"file://{tmp_path}/meeting"
        dist.init_process_group("gloo", meeting, timedelta(seconds=LONG), world_size=2, rank=rank)
        comm.create_local_process_group(2)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                spoil(patch, after=0)
            try:
                work(lambda: project.run(*opts), host="127.0.0.1", silence=60, stuck=60, may_tell=lambda: True)
            except RunStopped as stop:
                print(stop.message, file=sys.stderr)
                raise

    processes = Processes(start, 2, tmp_path)
    codes, said = processes.wait(), processes.errors()
    assert codes == [1, 1], said
    files = [tmp_path / stage / f"failed_step_0000000_worker_{rank}.pth" for rank in range(2)]
    kept = [file for file in files if file.exists()]
    assert kept == (files if stage == "squeeze" or norm != "BN" else files[1:])
    assert f"The batch and the weights are in {' and '.join(map(str, kept))}: run tools/replay.py on it" in said
    assert f"Stage {stage}, step 0 (of source " in said
    failure = read_failure(files[1])
    assert "areas" in wrong_sources(failure.losses)
    assert not torch.isfinite(failure.batch["areas"][0]["image"]).any()


def test_a_failed_step_is_no_checkpoint(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is one, ``--resume`` starts anew; the file stays, and takes the place of none."""
    out = project.root / "no_checkpoint"
    opts: list[Any] = ["OUTPUT_DIR", out]
    for after in (2, 3 * 2):  # the trial reads two images, and a step two: in the first step, then in the third
        with monkeypatch.context() as patch:
            spoil(patch, after=after)
            with pytest.raises(RunStopped):
                project.run(*opts, resume=out.exists())
    project.run(*opts, resume=True)
    names = {path.name for path in (out / "expand").glob("*.pth")}
    assert names == {
        *("failed_step_0000000_worker_0.pth", "failed_step_0000002_worker_0.pth"),
        *("model_0000001.pth", "model_final.pth"),
    }


def replay_command(monkeypatch: pytest.MonkeyPatch, file: Path) -> Any:
    """Exit code, or text, of ``tools/replay.py``; None without either."""
    monkeypatch.setattr(sys, "argv", ["replay.py", str(file)])
    try:
        runpy.run_path(str(ROOT / "tools/replay.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def test_the_command_refuses_other_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "x.pth")
    for name, message in (("x.pth", "is no whole failure file of a run"), ("y.pth", "There is no file")):
        said = replay_command(monkeypatch, tmp_path / name)
        assert said.startswith("error: The replay has 1 problem:")
        assert message in said


def test_the_source_that_spoils_the_others_is_named() -> None:
    """In the step itself Detectron2 stopped at another source's proposals, which had received what was spoilt."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, batch: dict[str, list[float]]) -> dict[str, torch.Tensor]:
            losses = {}
            for source, values in batch.items():
                if not self.norm.running_mean.isfinite():
                    raise FloatingPointError("Predicted boxes contain Inf/NaN.")
                losses[f"{source}/loss"] = self.norm(torch.tensor(values)[:, None]).sum()
            return losses

    model, batch = Model(), {"cells": [1.0, 2.0], "areas": [1.0, float("nan")], "birds": [0.5, 1.0]}
    before = {name: value.clone() for name, value in running_statistics(model).items()}
    with pytest.raises(FloatingPointError):
        model(batch)
    found = NonFiniteLoss(step=7, losses={}, reason="", batch=batch, model=model, statistics=before)
    assert guilty_sources(found) == ["areas"]
