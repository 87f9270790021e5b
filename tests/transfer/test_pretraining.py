"""The runs of a study: read, checked, run once each, and continued after a kill."""

import fcntl
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from disk_data import SIZE
from tiny_suite import NARROW, ROOT, TinySuite

from xlearner_d2.config import load_config
from xlearner_d2.engine.plan import EXPANDED_FILE
from xlearner_d2.results.records import read_records
from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer import pretraining
from xlearner_d2.transfer.backbones import BackboneSpec
from xlearner_d2.transfer.places import Places
from xlearner_d2.transfer.pretraining import (
    SETTINGS_FILE,
    StudySpec,
    backbones_of,
    check_output,
    check_runs,
    load_study,
    run_pretraining,
)

DEADLINE = 240


class StudyFiles(TinySuite):
    """A suite of one cell a backbone, a config that takes two steps, and a study of two runs of it."""

    def __init__(self, root: Path):
        super().__init__(root)
        sets = self.content["TRANSFER"]["SETS"]
        sets["pics"]["PROTOCOLS"] = ["knn"]
        del sets["boxes"], sets["areas"]
        self.write()
        self.config = root / "pretrain.yaml"
        self.config.write_text(yaml.safe_dump(self._config()))
        self.study = root / "study.yaml"
        self.parts: dict[str, Any] = {
            "SUITE": str(self.file),
            "CONFIG": str(self.config),
            "RUNS": {"expanding": None, "squeezing": ["XLEARNER.STAGE", "all"]},
            "BACKBONES": {
                "random": "random",
                "single": "expanding/expanded.pth:labels",
                "squeezed": "squeezing/student_d2.pth",
            },
        }
        self.write_study()

    def _config(self) -> dict[str, Any]:
        source = {
            "TASK": "labels",
            "CONFIG": "configs/heads/classifier.yaml",
            "TRAIN": ["s_pics"],
            "IMS_PER_BATCH": 4,
            "OPTS": ["INPUT.CLASSIFICATION.SIZE", SIZE],
        }
        squeeze = {"SOLVER": {"MAX_ITER": 2}, "BN_RECALIBRATION_BATCHES": 1}
        datasets = {"s_pics": self.content["XLEARNER"]["DATASETS"]["s_pics"]}
        return {
            "_BASE_": str(ROOT / "configs/base.yaml"),
            "MODEL": {"DEVICE": "cpu", "RESNETS": dict(NARROW)},
            "XLEARNER": {
                "STAGE": "expand",
                "DATASETS": datasets,
                "SOURCES": {"pics": source},
                "SQUEEZE": squeeze,
            },
            "SOLVER": {"MAX_ITER": 2, "WARMUP_ITERS": 0, "AMP": {"ENABLED": False}},
            "DATALOADER": {"NUM_WORKERS": 0},
        }

    def write_study(self) -> None:
        self.study.write_text(yaml.safe_dump(self.parts))


@pytest.fixture
def files(tmp_path: Path) -> StudyFiles:
    return StudyFiles(tmp_path)


# Study files


def test_a_study_is_what_its_file_says(files: StudyFiles) -> None:
    study = load_study(files.study)
    assert study.runs == {"expanding": [], "squeezing": ["XLEARNER.STAGE", "all"]}
    assert (study.suite, study.config) == (str(files.file), str(files.config))
    assert list(study.backbones) == ["random", "single", "squeezed"]


def test_backbones_are_in_the_files_that_the_runs_leave(files: StudyFiles) -> None:
    found = backbones_of(load_study(files.study), Path("out"))
    assert found == [
        BackboneSpec(name="random", path="random"),
        BackboneSpec(name="single", path="out/runs/seed{seed}/expanding/expanded.pth", task="labels"),
        BackboneSpec(name="squeezed", path="out/runs/seed{seed}/squeezing/student_d2.pth"),
    ]
    assert found[1].file(2) == Path("out/runs/seed2/expanding/expanded.pth")


def images_seen(study: StudySpec, name: str, *, file: str = "") -> int:
    """How many images a run sees until it leaves a file, or in all, with those of the files that it starts from."""
    pairs = list(zip(study.runs[name][::2], study.runs[name][1::2], strict=True))
    needed = {found for _, value in pairs for found in re.findall(r"\{(\w+)\}/([\w.]+)", value)}
    own = [item for pair in pairs if "{" not in pair[1] for item in pair]
    cfg = load_config(study.config, own)
    batch = sum(source["IMS_PER_BATCH"] for source in cfg.XLEARNER.SOURCES.values() if source)
    squeeze = cfg.XLEARNER.SQUEEZE.SOLVER.get("MAX_ITER", cfg.SOLVER.MAX_ITER)
    if cfg.XLEARNER.SQUEEZE.ONLINE:  # both stages in the same steps
        squeeze = 0
    expand = cfg.XLEARNER.TRUNK_STEPS + cfg.SOLVER.MAX_ITER
    steps = {"expand": expand, "squeeze": squeeze, "all": expand + squeeze}
    done = steps["expand" if file == EXPANDED_FILE else cfg.XLEARNER.STAGE]
    return int(batch * done + sum(images_seen(study, other, file=start) for other, start in needed))


@pytest.mark.parametrize(
    "name",
    [
        *("openmoji12_study", "openmoji12_ablation", "openmoji12_few_study"),
        *("real12_study", "real12_few_study", "real12_trunk_study"),
    ],
)
def test_all_backbones_of_a_shipped_study_saw_as_many_images(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(f"configs/transfer/{name}.yaml")
    seen = {images_seen(study, text.split("/")[0]) for text in study.backbones.values() if text != "random"}
    assert len(seen) == 1
    said = re.search(r"sees ([\d,]+) images", Path(f"configs/transfer/{name}.yaml").read_text())
    assert said is None or seen == {int(said[1].replace(",", ""))}


CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "missing and unknown keys": (
        lambda parts: parts.update(RUN=parts.pop("RUNS")),
        ["lacks the key RUNS.", "has the unknown key 'RUN'. Did you mean 'RUNS'?"],
    ),
    "missing files": (
        lambda parts: parts.update(SUITE="gone.yaml", CONFIG=3),
        ["SUITE is 'gone.yaml', but a file is expected.", "CONFIG is 3, but a file is expected."],
    ),
    "lists": (
        lambda parts: parts.update(RUNS=["a"], BACKBONES=None),
        ["RUNS is ['a'], but names with what each stands", "BACKBONES is None, but names with what each stands"],
    ),
    "odd overrides": (
        lambda parts: parts["RUNS"].update(expanding=["SEED"], squeezing="SEED 3"),
        ["RUNS.expanding is ['SEED'], but a list of pairs", "RUNS.squeezing is 'SEED 3', but a list of pairs"],
    ),
    "runs that need no earlier run": (
        lambda parts: parts["RUNS"].update(
            expanding=["MODEL.WEIGHTS", "{squeezing}/expanded.pth"],
            squeezing=["XLEARNER.SQUEEZE.TEACHER", "{expand}/x"],
        ),
        [
            "RUNS.expanding needs {squeezing}, which is no run above it.",
            "RUNS.squeezing needs {expand}, which is no run above it. Did you mean 'expanding'?",
        ],
    ),
    "backbones of nothing": (
        lambda parts: parts["BACKBONES"].update(single="expandin/x.pth", squeezed="squeezing", random=None),
        [
            "BACKBONES.random is None, but RUN/FILE, RUN/FILE:TASK or random is expected.",
            "BACKBONES.single is of the unknown run 'expandin'. Did you mean 'expanding'?",
            "BACKBONES.squeezed is 'squeezing', but RUN/FILE, RUN/FILE:TASK or random is expected.",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_problems_of_a_study_file_come_at_once(files: StudyFiles, name: str) -> None:
    spoil, expected = CASES[name]
    spoil(files.parts)
    files.write_study()
    with pytest.raises(ConfigError) as caught:
        load_study(files.study)
    assert len(caught.value.problems) == len(expected)
    for found, part in zip(caught.value.problems, expected, strict=True):
        assert found.startswith(str(files.study))
        assert part in found


def test_no_study_file() -> None:
    with pytest.raises(ConfigError, match=r"There is no config file gone\.yaml"):
        load_study("gone.yaml")


def test_problems_of_all_runs_come_at_once(files: StudyFiles) -> None:
    runs = {
        "one": ["XLEARNER.SHARING", "joined"],
        "two": ["XLEARNER.SOURCES.pics.TRAIN", "[s_pic]", "XLEARNER.SQUEEZE.DEPTH", "51"],
        "three": ["SOLVER.MAXITER", "3"],
        "good": [],
    }
    with pytest.raises(ConfigError) as caught:
        check_runs(
            StudySpec(suite=str(files.file), config=str(files.config), runs=runs, backbones={}), files.root / "out"
        )
    found = caught.value.problems
    assert [text.split(":")[0] for text in found] == ["run one", "run two", "run two", "run three"]
    assert "XLEARNER.SHARING is 'joined'" in found[0]


def test_growth_and_an_online_squeeze_within_a_study(files: StudyFiles) -> None:
    """What a run grows from is not there yet, so what it freezes cannot be checked."""
    runs = {
        "before": ["XLEARNER.STAGE", "expand"],
        "grown": [
            *("XLEARNER.STAGE", "expand", "XLEARNER.EXTEND", "{before}/expanded.pth"),
            *("XLEARNER.FREEZE", "[labels]", "XLEARNER.EXTEND_INIT", "random"),
        ],
        "online": ["XLEARNER.STAGE", "expand", "XLEARNER.SQUEEZE.ONLINE", "True"],
    }
    study = StudySpec(
        suite=str(files.file),
        config=str(files.config),
        runs=runs,
        backbones={"grown": "grown/expanded.pth:labels", "squeezed": "online/student_d2.pth"},
    )
    check_runs(study, files.root / "out")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR is '.*study\.yaml/out', which is no folder"):
        check_runs(study, files.study / "out")


def test_backbones_that_no_run_will_leave_are_found_before_training(files: StudyFiles) -> None:
    study = load_study(files.study)
    backbones = {
        "single": "expanding/expanded.pth:label",
        "single/all": "expanding/expanded.pth",
        "squeezed": "expanding/student_d2.pth",
        "squeezed/of a task": "squeezing/student_d2.pth:labels",
        "squeezed/kept": "squeezing/squeeze/model_0000001.pth",
    }
    with pytest.raises(ConfigError) as caught:
        check_runs(replace(study, backbones=backbones), files.root / "out")
    assert caught.value.problems == [
        "BACKBONES: 'squeezed/of a task': a role such as squeezed, or role/variant, of letters, digits, - and _ is "
        "expected.",
        "BACKBONES.single is 'expanding/expanded.pth:label', but expanded.pth needs :TASK, one of labels.",
        "BACKBONES.single/all is 'expanding/expanded.pth', but expanded.pth needs :TASK, one of labels.",
        "BACKBONES.squeezed is 'expanding/student_d2.pth', but the run expanding leaves expanded.pth; see its "
        "XLEARNER.STAGE.",
        "BACKBONES.squeezed/of a task is 'squeezing/student_d2.pth:labels', but student_d2.pth has no branches, so no "
        ":TASK.",
    ]


# Running, with a stand-in for the training


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Outputs of the runs that were started; a run of a name with "bad" fails."""
    found: list[str] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        output = Path(command[command.index("OUTPUT_DIR") + 1])
        found.append(f"{output.parent.name}/{output.name}")
        if "bad" in output.name:
            return SimpleNamespace(returncode=1)
        (output / "metrics.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    return found


def some_runs(*names: str) -> StudySpec:
    return StudySpec(suite="", config="configs/quick/openmoji.yaml", runs={name: [] for name in names}, backbones={})


def idle() -> None:
    """Does nothing while the last runs run."""


def never() -> None:
    """With one place, none is free before all runs have ended."""
    raise AssertionError


def test_each_run_is_run_once(tmp_path: Path, started: list[str]) -> None:
    assert run_pretraining(some_runs("a", "b"), [0, 1], tmp_path, places=Places(1), meanwhile=never) == []
    assert started == ["seed0/a", "seed0/b", "seed1/a", "seed1/b"]
    assert run_pretraining(some_runs("a", "b", "c"), [0, 1], tmp_path, places=Places(2), meanwhile=idle) == []
    assert sorted(started[4:]) == ["seed0/c", "seed1/c"]


def test_runs_that_fail_are_named_and_run_again(tmp_path: Path, started: list[str]) -> None:
    for _ in range(2):
        assert run_pretraining(some_runs("a", "bad", "c"), [0], tmp_path, places=Places(2), meanwhile=idle) == [
            ("bad", 0)
        ]
    assert sorted(started) == ["seed0/a", "seed0/bad", "seed0/bad", "seed0/c"]


def test_no_run_is_started_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that goes on has the signal as well, and ends when it has saved its step."""
    started = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        started.append(command[-1])
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return SimpleNamespace(returncode=130)

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pretraining(some_runs("a", "b", "c"), [0], tmp_path, places=Places(1), meanwhile=never)
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(1)  # in which another one would be started
    assert started == [str(tmp_path / "runs/seed0/a")]


@pytest.mark.parametrize(
    ("seen", "jobs", "expected"), [("", 2, {"0", "1"}), ("3,5", 2, {"3", "5"}), ("3,5", 1, {"3"}), ("7", 3, {"7"})]
)
def test_runs_of_one_time_are_spread_over_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str, jobs: int, expected: set[str]
) -> None:
    """Those that run at a time, which meet here, have one each as long as there are enough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    meeting, given = threading.Barrier(jobs, timeout=30), []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        given.append(options["env"]["CUDA_VISIBLE_DEVICES"])
        meeting.wait()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    run_pretraining(some_runs("a", "b", "c", "d", "e", "f"), [0], tmp_path, places=Places(jobs), meanwhile=idle)
    assert [set(given[first : first + jobs]) for first in range(0, 6, jobs)] == [expected] * (6 // jobs)


def chain() -> StudySpec:
    """A run, and two that start from what it leaves."""
    study = some_runs("first", "bad", "third")
    teacher = ["XLEARNER.SQUEEZE.TEACHER", "{first}/expanded.pth"]
    return replace(study, runs={**study.runs, "second": teacher, "never": ["MODEL.WEIGHTS", "{bad}/expanded.pth"]})


def test_a_run_starts_after_those_that_it_needs(tmp_path: Path, started: list[str]) -> None:
    assert run_pretraining(chain(), [0], tmp_path, places=Places(3), meanwhile=idle) == [("bad", 0), ("never", 0)]
    assert "seed0/never" not in started
    assert started.index("seed0/first") < started.index("seed0/second")


def test_what_can_be_done_beside_the_last_run_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the place that the last run does not need, and no other."""
    taken: set[int] = set()
    ended: list[str] = []
    done = threading.Event()

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        if command[-1].endswith("last"):
            assert done.wait(timeout=30)
        ended.append(Path(command[-1]).name)
        return SimpleNamespace(returncode=0)

    def meanwhile() -> None:
        with places.take() as place:
            taken.add(place)
            assert places._free.empty()
            assert sorted(ended) == ["a", "b", "c"]
        done.set()

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    places = Places(2)
    assert run_pretraining(some_runs("a", "b", "c", "last"), [0], tmp_path, places=places, meanwhile=meanwhile) == []
    assert len(taken) == 1
    assert places._free.qsize() == 2


def test_runs_that_are_never_started_are_not_waited_for(tmp_path: Path, started: list[str]) -> None:
    failed = run_pretraining(chain(), [0], tmp_path, places=Places(2), meanwhile=idle)
    assert failed == [("bad", 0), ("never", 0)]
    run_pretraining(some_runs("first", "third"), [0], tmp_path, places=Places(2), meanwhile=never)  # all are finished


def test_an_error_in_a_run_that_others_need_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever for the others to begin."""

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        raise OSError("the disk is full")

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(OSError, match="the disk is full"):
        run_pretraining(chain(), [0], tmp_path, places=Places(2), meanwhile=idle)


def test_who_waits_for_a_place_gets_none_once_they_are_closed() -> None:
    places, errors = Places(1), []

    def take() -> None:
        try:
            with places.take():
                errors.append("taken")
        except CancelledError:
            errors.append("cancelled")

    with places.take():
        waiting = threading.Thread(target=take)
        waiting.start()
        places.close()
    waiting.join(timeout=30)
    take()
    assert errors == ["cancelled", "cancelled"]


def test_a_run_is_given_the_folder_of_the_one_that_it_needs(tmp_path: Path) -> None:
    given = list(pretraining._filled(chain().runs["second"], tmp_path, 3))
    assert given == ["XLEARNER.SQUEEZE.TEACHER", f"{tmp_path}/runs/seed3/first/expanded.pth"]


def test_a_run_is_another_one_when_one_that_it_needs_is(tmp_path: Path) -> None:
    study = chain()
    changed = replace(study, runs={**study.runs, "first": ["SOLVER.MAX_ITER", "9"]})
    one, other = (pretraining._settings(of, "second") for of in (study, changed))
    assert one != other
    assert pretraining._settings(study, "third") == pretraining._settings(changed, "third")


def test_a_run_is_another_one_when_the_config_of_a_head_is(files: StudyFiles) -> None:
    head = files.root / "head.yaml"
    head.write_text((ROOT / "configs/heads/classifier.yaml").read_text())
    files.parts["RUNS"]["expanding"] = ["XLEARNER.SOURCES.pics.CONFIG", str(head)]
    files.write_study()
    study = load_study(files.study)
    names = ("expanding", "squeezing")
    before = [pretraining._settings(study, name) for name in names]
    head.write_text(head.read_text() + "SEED: 3\n")
    after = [pretraining._settings(study, name) for name in names]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_files_of_earlier_runs_are_not_looked_for_before_they_run(files: StudyFiles) -> None:
    files.parts["RUNS"]["squeezing"] = [
        "XLEARNER.STAGE",
        "squeeze",
        "XLEARNER.SQUEEZE.TEACHER",
        "{expanding}/expanded.pth",
    ]
    files.write_study()
    check_runs(load_study(files.study), files.root / "out")


def test_cost_is_that_of_all_attempts(tmp_path: Path) -> None:
    for seconds in (10.2, 5.1):
        pretraining._add_cost(tmp_path / "cost.json", seconds, 2)
    assert json.loads((tmp_path / "cost.json").read_text()) == {"seconds": 15, "threads": 2}


def test_a_run_that_another_process_is_at_is_waited_for(
    tmp_path: Path, started: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output = tmp_path / "runs/seed0/a"
    output.mkdir(parents=True)
    with (output / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = {"places": Places(1), "meanwhile": never}
        study = threading.Thread(target=run_pretraining, args=(some_runs("a"), [0], tmp_path), kwargs=options)
        study.start()
        while "Waiting for another process" not in caplog.text and study.is_alive():
            time.sleep(0.01)
        (output / "metrics.json").write_text("{}")
    study.join(timeout=30)
    assert not study.is_alive()
    assert started == []


# Whole studies


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """tools/study.py in this process."""
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools/study.py"), run_name="__main__")


def when_written(out: Path) -> dict[Path, int]:
    """Without the report, which is made anew."""
    return {path: path.stat().st_mtime_ns for part in ("runs", "cells") for path in (out / part).rglob("*.*")}


def test_a_killed_study_is_completed(files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first run outlives it, and is not run a second time."""
    out = files.root / "out"
    arguments = ["--study", files.study, "--output", out, "--seeds", 1]
    process = subprocess.Popen([sys.executable, str(ROOT / "tools/study.py"), *map(str, arguments)])
    log = out / "runs/seed0/expanding/stdout.txt"
    deadline = time.monotonic() + DEADLINE
    while not log.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.is_file()
    command(monkeypatch, *arguments)
    assert log.read_text().count("The expanded model is in") == 1
    assert {path.name for path in out.glob("runs/seed0/*/*.pth")} == {"expanded.pth", "student_d2.pth"}
    records = read_records(out)
    assert {(record.backbone, record.protocol) for record in records} == {
        (name, "knn") for name in ("random", "single", "squeezed")
    }
    before = when_written(out)
    command(monkeypatch, *arguments)  # all is done
    assert when_written(out) == before


def test_a_study_that_fails_says_so_and_measures_what_is_there(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    files.parts["RUNS"] = {"bad": None, "good": None}
    files.parts["BACKBONES"] = {"random": "random", "lost": "bad/expanded.pth:labels"}
    files.write_study()
    with pytest.raises(SystemExit) as caught:
        command(
            monkeypatch, "--study", files.study, "--output", files.root / "out", "--seeds", 2, "--subject", "random"
        )
    assert caught.value.code == "error: The pre-training has 1 problem:\n  1. bad, seed 0 failed."
    assert started == ["seed0/bad", "seed0/good"]
    assert [(record.backbone, record.seed) for record in read_records(files.root / "out")] == [("random", 0)]


def test_backbones_are_measured_while_the_last_run_runs(files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run ends when there is a record of another one's backbone, and its own is measured then."""
    out = files.root / "out"
    before_the_end: list[str] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        output = Path(command[command.index("OUTPUT_DIR") + 1])
        deadline = time.monotonic() + DEADLINE
        while output.name == "last" and not read_records(out) and time.monotonic() < deadline:
            time.sleep(0.02)
        before_the_end.extend(record.backbone for record in read_records(out))
        (output / "found").mkdir()
        shutil.copy(files.student(), output / "found/model.pth")
        (output / "metrics.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pretraining, "subprocess", SimpleNamespace(run=run))
    files.parts["RUNS"] = {"first": None, "last": None}
    files.parts["BACKBONES"] = {"single": "first/found/model.pth", "squeezed": "last/found/model.pth"}
    files.write_study()
    command(monkeypatch, "--study", files.study, "--output", out, "--seeds", 1, "--jobs", 2)
    assert before_the_end == ["single"]
    assert {record.backbone for record in read_records(out)} == {"single", "squeezed"}


def test_a_backbone_that_no_run_left_is_told(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """Nothing is known beforehand of files in folders below that of a run."""
    files.parts["RUNS"] = {"good": None}
    files.parts["BACKBONES"] = {"random": "random", "lost": "good/expand/model_0000299.pth:labels"}
    files.write_study()
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--study", files.study, "--output", files.root / "out", "--subject", "random")
    assert "--weights lost: there is no file" in str(caught.value.code)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("SUITE", {"TRANSFER": {"SETS": {"pics": {"TEST": "s_pic"}}}}, "the unknown data set 's_pic'"),
        ("RUNS", {"expanding": ["SOLVER.MAXITER", 3]}, "run expanding: There is no setting SOLVER.MAXITER"),
    ],
)
def test_a_study_is_checked_before_anything_is_trained(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch, started: list[str], part: str, value: Any, message: str
) -> None:
    if part == "SUITE":
        path = files.root / "other.yaml"
        path.write_text(yaml.safe_dump({"_BASE_": str(files.file), **value}))
        value = str(path)
    files.parts[part] = value
    files.parts["BACKBONES"] = {"random": "random"}
    files.write_study()
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--study", files.study, "--output", files.root / "out")
    assert message in str(caught.value.code)
    assert started == []
    assert not (files.root / "out").exists()


def test_a_subject_that_is_not_there_is_found_before_anything_is_trained(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--study", files.study, "--output", files.root / "out", "--subject", "squeeze")
    assert "The subject is 'squeeze', but the backbones are random, single, squeezed." in str(caught.value.code)
    assert started == []


def test_a_run_with_other_settings_is_refused(files: StudyFiles, tmp_path: Path) -> None:
    study = load_study(files.study)
    folder = tmp_path / "out/runs/seed0/squeezing"
    folder.mkdir(parents=True)
    (folder / SETTINGS_FILE).write_text("of another study\n")
    with pytest.raises(ConfigError, match=r"seed0/squeezing was made with other settings\. Remove it"):
        check_output(study, [0], tmp_path / "out")
    check_output(study, [1], tmp_path / "out")
