"""Runs that are killed, stopped or starved of disk end, once resumed, as if nothing had happened."""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from detectron2.utils import comm

from xlearner_d2.checkpoint import files
from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.engine.run import alone_in
from xlearner_d2.engine.steps import StepTrainer
from xlearner_d2.engine.stopping import RunStopped, StopSignals

STEPS = 5


def shorten(project: Project) -> Project:
    """Two sources, one of which is evaluated at every other step, when there is a checkpoint as well."""
    content = project.content
    del content["XLEARNER"]["SOURCES"]["boxes"]
    content["XLEARNER"]["SOURCES"]["areas"]["TEST"] = []
    content["TEST"] = {"EVAL_PERIOD": 2}
    content["XLEARNER"]["PROBES"] = {}
    content["XLEARNER"]["SQUEEZE"] |= {"SOLVER": {"MAX_ITER": STEPS}, "EMA_DECAY": 0.9}
    content["SOLVER"] |= {"MAX_ITER": STEPS, "CHECKPOINT_PERIOD": 2}
    project.write(content)
    return project


def in_child(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; its exit code, or minus the signal that ended it."""
    return end_of(start_child(work))


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_child(work: Callable[[], Any]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except RunStopped as stop:
            print(stop.message, file=sys.stderr)
            code = int(str(stop.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def killed_at(monkeypatch: pytest.MonkeyPatch, where: str, count: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal at the ``count``-th step from now, or in the midst of writing a file."""
    left = [count]

    def counting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if where == "save" and left[0] == 0:
                args[1].write(b"half a checkpoint")
                args[1].flush()
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        return call

    thing, name = (StepTrainer, "run_step") if where == "step" else (files.torch, "save")
    monkeypatch.setattr(thing, name, counting(getattr(thing, name)))


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a stage's ``metrics.json`` without what depends on the clock and the machine."""
    clocks = {"time", "data_time", "rank_data_time", "images_per_second", "data_wait", "memory_gb"}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.split("/")[-1] not in clocks} for line in found]


def assert_same_results(project: Project, first: str, second: str, *names: str) -> None:
    for name in names:
        one, other = (read_checkpoint(project.root / folder / name)["model"] for folder in (first, second))
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], name
    for path in (project.root / second).glob("*/metrics.json"):
        assert metrics(path) == metrics(project.root / first / path.parent.name / path.name), path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of both stages that was left alone, in the folder ``alone``."""
    project = shorten(Project(tmp_path_factory.mktemp("resume")))
    project.run("OUTPUT_DIR", project.root / "alone")
    return project


def test_sources_are_evaluated_on_the_way(alone: Project) -> None:
    found = [line for line in metrics(alone.root / "alone/expand/metrics.json") if any("top1" in key for key in line)]
    assert len(found) > 0
    assert found[0]["iteration"] < STEPS - 1


def test_what_is_exported_is_the_average_with_statistics_of_its_own(alone: Project) -> None:
    trunk, conv, statistics = "backbone.branches.trunk.", "res2.0.conv1.weight", "stem.conv1.norm.running_mean"
    before, last = (
        torch.load(alone.root / f"alone/squeeze/{name}.pth", weights_only=False)
        for name in ("model_0000003", "model_final")
    )
    ((earlier,), (average,)) = (found_below(state, "average") for state in (before, last))
    (trained,) = found_below(before, "distiller")
    assert not torch.equal(earlier[trunk + conv], average[trunk + conv]), "it follows"
    assert not torch.equal(earlier[trunk + conv], trained[f"student.{conv}"]), "and stays behind"
    student = read_checkpoint(alone.root / "alone/student_d2.pth")["model"]
    assert torch.equal(student[conv], average[trunk + conv])
    assert not torch.equal(student[statistics], average[trunk + statistics])


def found_below(tree: Any, wanted: str) -> list[Any]:
    """What dictionaries within dictionaries have under a key."""
    if not isinstance(tree, dict):
        return []
    here = [tree[wanted]] if wanted in tree else []
    return [*here, *(found for value in tree.values() for found in found_below(value, wanted))]


def test_a_run_in_low_precision_resumes_exactly(alone: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configs/base.yaml has it; also on a CPU for which bfloat16 is slow."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    low = ("SOLVER.AMP.ENABLED", True, "TEST.EVAL_PERIOD", 0)
    alone.run(*low, "OUTPUT_DIR", alone.root / "low")
    out = alone.root / "low_killed"
    for count in (4, 5):  # in the expansion; then in the squeeze, after the last step of the expansion
        with monkeypatch.context() as patch:
            killed_at(patch, "step", count)
            assert in_child(lambda: alone.run(*low, "OUTPUT_DIR", out, resume=out.exists())) == -signal.SIGKILL
    alone.run(*low, "OUTPUT_DIR", out, resume=True)
    assert_same_results(alone, "low", "low_killed", "expanded.pth", "student_d2.pth")
    high, found = (read_checkpoint(alone.root / name / "expanded.pth")["model"] for name in ("alone", "low"))
    assert any(not torch.equal(high[name], found[name]) for name in high)


@pytest.mark.parametrize(("processes", "steps"), [(0, (4, 2)), (2, (1, 5))])
def test_killed_again_and_again(
    alone: Project, monkeypatch: pytest.MonkeyPatch, processes: int, steps: tuple[int, int]
) -> None:
    """SIGKILL in a step of either stage, or while a file is being written; each time the run is resumed.

    With processes that read the images as well: those that a killed run leaves behind end by themselves.
    """
    folder = f"killed_{processes}"
    out = ("OUTPUT_DIR", alone.root / folder, "DATALOADER.NUM_WORKERS", processes)
    kills = [("step", steps[0]), ("save", 1), ("step", None), ("save", 1)]
    for where, count in kills:
        done = last_step(alone.root / folder / "expand")
        # None: a step of the squeeze, after those of the expansion that are to be done again.
        count = count or STEPS - done + steps[1]
        with monkeypatch.context() as patch:
            killed_at(patch, where, count)
            end = in_child(lambda: alone.run(*out, resume=(alone.root / folder).exists()))
        assert end == -signal.SIGKILL, (where, count, done)
    assert (alone.root / folder / "squeeze").exists()
    assert in_child(lambda: alone.run(*out, resume=True)) == 0
    assert_same_results(alone, "alone", folder, "expanded.pth", "student_d2.pth")
    assert list((alone.root / folder).rglob(".*.part")) == []


def last_step(folder: Path) -> int:
    """How many steps the last checkpoint of a stage has seen."""
    noted = folder / "last_checkpoint"
    if not noted.exists():
        return 0
    return STEPS if "final" in noted.read_text() else int(noted.read_text()[len("model_") : -len(".pth")]) + 1


def test_a_running_number_of_objects_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RetinaNet divides its losses by one that is in no state dict; the student's heads have one of their own."""
    project = Project(tmp_path)
    source = project.content["XLEARNER"]["SOURCES"]["boxes"]
    source |= {"CONFIG": "configs/heads/light_retinanet_fpn.yaml", "OPTS": ["INPUT.MIN_SIZE_TRAIN", [64]], "TEST": []}
    project.content["XLEARNER"] |= {"SOURCES": {"boxes": source}, "PROBES": {}}
    project.content["XLEARNER"]["SQUEEZE"]["SOLVER"] = {"MAX_ITER": 3}
    project.content["SOLVER"] |= {"MAX_ITER": 3, "CHECKPOINT_PERIOD": 2}
    project.write(project.content)
    project.run("OUTPUT_DIR", project.root / "alone")
    out = project.root / "killed"
    for count in (3, 4):  # the third step of the expansion; then that of the squeeze
        with monkeypatch.context() as patch:
            killed_at(patch, "step", count)
            assert in_child(lambda: project.run("OUTPUT_DIR", out, resume=out.exists())) == -signal.SIGKILL
    project.run("OUTPUT_DIR", project.root / "killed", resume=True)
    assert_same_results(project, "alone", "killed", "expanded.pth", "student_d2.pth")


def test_a_signal_saves_and_stops(
    alone: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in the expansion, then SIGINT in the squeeze."""
    out = ("OUTPUT_DIR", alone.root / "stopped")
    for number, count, stage, step in ((signal.SIGTERM, 3, "expand", 3), (signal.SIGINT, 4, "squeeze", 2)):
        with monkeypatch.context() as patch:
            killed_at(patch, "step", count, number)
            assert in_child(lambda: alone.run(*out, resume=(alone.root / "stopped").exists())) == 128 + number
        said = capfd.readouterr().err
        assert f"Stopped by {number.name} after step {step} of {STEPS}; its state is in" in said
        assert f"stopped/{stage}/model_{step - 1:07d}.pth. Add --resume to go on from there." in said
        assert "Traceback" not in said
    alone.run(*out, resume=True)
    assert_same_results(alone, "alone", "stopped", "expanded.pth", "student_d2.pth")


def test_a_second_signal_stops_at_once() -> None:
    """One that comes within a second is the same one, which a scheduler sends to every process."""
    signals = StopSignals()
    signals.install()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM
        signals._time -= 60
        with pytest.raises(RunStopped, match="Stopped by a second SIGTERM, without saving"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signals.restore()


def test_a_signal_while_nothing_is_trained(
    alone: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def evaluate(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("xlearner_d2.engine.run.evaluate_sources", evaluate)
    out = ("OUTPUT_DIR", alone.root / "alone")
    assert in_child(lambda: alone.run(*out, eval_only=True)) == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM. Add --resume to go on from the last checkpoint." in capfd.readouterr().err


def test_two_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    """While one lasts, and no longer; processes that it has forked do not count."""

    def enter() -> None:
        with alone_in(str(tmp_path)):
            pass

    with alone_in(str(tmp_path)):
        assert in_child(enter) == 70
    assert in_child(enter) == 0

    def killed() -> None:
        with alone_in(str(tmp_path)):
            (tmp_path / "left").write_text(str(start_child(lambda: time.sleep(60))))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    enter()
    os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_runs_in_one_process_log_into_their_own_folders(alone: Project) -> None:
    before = (alone.root / "alone/log.txt").read_text()
    alone.run("XLEARNER.STAGE", "expand", "OUTPUT_DIR", alone.root / "another", "TEST.EVAL_PERIOD", 0)
    assert (alone.root / "alone/log.txt").read_text() == before
    lines = (alone.root / "another/log.txt").read_text().splitlines()
    assert sum("Command: " in line for line in lines) == 1


def test_online_squeeze_resumes_exactly(alone: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    online = ("XLEARNER.SQUEEZE.ONLINE", True, "XLEARNER.STAGE", "expand")
    alone.run(*online, "OUTPUT_DIR", alone.root / "online")
    with monkeypatch.context() as patch:
        killed_at(patch, "step", 2 * STEPS - 1)  # in the squeeze's part of a step
        assert in_child(lambda: alone.run(*online, "OUTPUT_DIR", alone.root / "online2")) == -signal.SIGKILL
    alone.run(*online, "OUTPUT_DIR", alone.root / "online2", resume=True)
    assert_same_results(alone, "online", "online2", "expanded.pth", "student_d2.pth")


def test_a_damaged_checkpoint_is_passed_over_and_a_full_disk_loses_nothing(
    alone: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the expansion with two checkpoints, of which the last loses its end; then files may not grow."""
    out = ("OUTPUT_DIR", alone.root / "damaged", "XLEARNER.STAGE", "expand")
    with monkeypatch.context() as patch:
        killed_at(patch, "step", STEPS)
        assert in_child(lambda: alone.run(*out)) == -signal.SIGKILL
    folder = alone.root / "damaged/expand"
    assert sorted(path.name for path in folder.glob("*.pth")) == ["model_0000001.pth", "model_0000003.pth"]
    last = folder / "model_0000003.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    capfd.readouterr()

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        alone.run(*out, resume=True)

    assert in_child(starved) == 1
    said = "".join(capfd.readouterr())
    assert "model_0000003.pth is damaged (File is not a zip file). The checkpoint before it is used instead" in said
    assert f"{last} could not be written: File too large. Make room, then add --resume to go on" in said
    assert "Traceback" not in said
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"  # damaged still, and the one before it whole
    alone.run(*out, resume=True)
    assert_same_results(alone, "alone", "damaged", "expanded.pth")


def two_workers(project: Project, *opts: Any, resume: bool = False, stop: int = 0) -> list[int]:
    """Exit codes of a run on two processes; the second one gets SIGTERM in step ``stop``."""
    meeting = project.root / f"meeting{random.random()}"

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        comm.create_local_process_group(2)
        with pytest.MonkeyPatch.context() as patch:
            if stop and rank == 1:
                killed_at(patch, "step", stop, signal.SIGTERM)
            project.run(*opts, resume=resume)

    return [end_of(child) for child in [start_child(partial(work, rank)) for rank in range(2)]]


def test_two_workers_stop_in_the_same_step_and_go_on_with_statistics_of_their_own(
    alone: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    """In either stage, after steps without an evaluation, which shares the statistics.

    BN is not synchronised: workers' running statistics differ, and losses depend on them.
    """
    assert two_workers(alone, "OUTPUT_DIR", alone.root / "two") == [0, 0]
    out = ("OUTPUT_DIR", alone.root / "two_stopped")
    statistics = []
    for count, stage, step in ((3, "expand", 3), (STEPS - 3 + 3, "squeeze", 3)):
        assert two_workers(alone, *out, stop=count, resume=stage == "squeeze") == [143, 143]
        assert capfd.readouterr().err.count(f"Stopped by SIGTERM after step {step} of {STEPS}") == 1
        found = read_checkpoint(alone.root / f"two_stopped/{stage}/model_{step - 1:07d}.pth")
        statistics.append(found["worker_statistics"]["workers"])
    for first, second in statistics:
        assert any(not torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert two_workers(alone, *out, resume=True) == [0, 0]
    assert_same_results(alone, "two", "two_stopped", "expanded.pth", "student_d2.pth")
