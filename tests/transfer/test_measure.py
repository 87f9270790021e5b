"""A study with real worker processes: killed, continued, with a cell that fails; and what is measured again when."""

import hashlib
import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_suite import ROOT, TinySuite, fine_tune, one_set

from xlearner_d2.engine import provenance
from xlearner_d2.results.records import CellRecord, read_records
from xlearner_d2.results.statistics import analyse
from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer import measure as measuring
from xlearner_d2.transfer import runner
from xlearner_d2.transfer.backbones import BackboneSpec, parse_backbones
from xlearner_d2.transfer.measure import measure
from xlearner_d2.transfer.places import Places
from xlearner_d2.transfer.runner import Cell, all_cells, commit, run_cell, unfinished, worker_threads

DIVERGING = ["SOLVER.BASE_LR", 1e38, "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.MAX_ITER", 3]
DEADLINE = 240


class Study(TinySuite):
    """A tiny suite with backbones of each kind, whose study went wrong in two ways."""

    def __init__(self, root: Path):
        super().__init__(root)
        found = self.content["TRANSFER"]
        head = "configs/transfer/heads/linear_segmentation.yaml"
        found["PROTOCOLS"]["diverging"] = fine_tune("sem_seg/mIoU", head, *DIVERGING)
        found["SETS"]["areas"] = one_set("segmentation", "s_areas", "linear", "diverging")
        self.write()
        self.out = root / "out"
        self.weights = ["random=random", f"squeezed={self.student()}", f"expanded/boxes={self.expanded()}:objects"]
        self.killed: dict[Path, int] = {}
        self.workers: list[int] = []
        self.failure = ""

    @property
    def backbones(self) -> list[BackboneSpec]:
        return parse_backbones(self.weights)

    @property
    def records(self) -> list[CellRecord]:
        return read_records(self.out)

    def files(self) -> dict[Path, int]:
        """Times at which the records were written."""
        return {path: path.stat().st_mtime_ns for path in self.out.glob("cells/*/*/*.json")}

    def dry_run(self, capsys: pytest.CaptureFixture[str], *opts: str, weights: Sequence[str] = ()) -> dict[str, bool]:
        """Whether each cell is finished, by its name."""
        capsys.readouterr()
        backbones = parse_backbones(weights) if weights else self.backbones
        measure(str(self.file), backbones, [0], self.out, opts=opts, dry_run=True)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("to do  ", "done   "))]
        return {line[7:]: line.startswith("done") for line in lines}


def processes(parent: int) -> list[int]:
    """Of Linux: the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(what: Callable[[], object]) -> bool:
    deadline = time.monotonic() + DEADLINE
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(what())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Its command is killed after the first record, then it is continued by two jobs; three of its cells fail."""
    found = Study(tmp_path_factory.mktemp("study"))
    command = [sys.executable, str(ROOT / "tools/transfer.py"), "--suite", str(found.file), "--output", str(found.out)]
    with (found.root / "log.txt").open("w") as log:
        command += ["--seeds", "1", "--weights", *found.weights]
        process = subprocess.Popen(command, cwd=found.root, stdout=log, stderr=log)
        wait_for(lambda: found.files() or process.poll() is not None)
        found.workers = processes(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found.killed = found.files()
    assert found.killed, (found.root / "log.txt").read_text()
    with pytest.raises(ConfigError) as caught:
        measure(str(found.file), found.backbones, [0], found.out, places=Places(2))
    found.failure = str(caught.value)
    return found


@pytest.mark.parametrize(
    ("cores", "allowed", "jobs", "threads"), [(8, 8, 2, 4), (8, 1, 2, 1), (8, 8, 3, 2), (2, 2, 4, 1), (8, 3, 1, 3)]
)
def test_workers_share_the_cores_that_are_allowed(
    cores: int, allowed: int, jobs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)
    assert worker_threads(jobs) == threads


# A study that was killed, and one cell of which fails


def test_killing_a_study_ends_its_workers(study: Study) -> None:
    assert study.workers
    assert wait_for(lambda: not any(map(is_running, study.workers)))


def test_a_killed_study_continues(study: Study) -> None:
    assert len(study.killed) < 12
    assert study.killed.items() <= study.files().items()


def test_a_cell_that_fails_does_not_lose_the_others(study: Study) -> None:
    assert study.failure.startswith("3 of ")
    assert "cells failed; what failed first has 3 problems" in study.failure
    for name in ("random", "squeezed", "expanded/boxes"):
        assert f"areas, diverging, {name}, seed 0: FloatingPointError" in study.failure
    found = {(record.set_name, record.protocol, record.backbone) for record in study.records}
    pairs = [("pics", "probe"), ("pics", "knn"), ("boxes", "dense"), ("areas", "linear")]
    assert found == {(*pair, name) for pair in pairs for name in ("random", "squeezed", "expanded/boxes")}


def test_records_hold_what_a_reader_needs(study: Study) -> None:
    student = hashlib.sha256((study.root / "student.pth").read_bytes()).hexdigest()
    for record in study.records:
        assert (record.suite, record.seed) == ("tiny", 0)
        assert 0 <= record.value <= 100
        assert record.seconds > 0
        assert "threads" in record.hardware
        assert record.weights == {"random": "", "squeezed": student}.get(record.role, record.weights)
    (dense, *_) = [record for record in study.records if record.protocol == "dense"]
    assert (dense.family, dense.metric, dense.trivial) == ("detection", "bbox/AP", 0.0)
    assert dense.details["num_train"] == 8


def test_a_worker_measures_what_this_process_would(study: Study, tmp_path: Path) -> None:
    suite = study.parse()
    for record in study.records:
        if record.backbone == "squeezed":
            cell = Cell(set_name=record.set_name, protocol=record.protocol, backbone=study.backbones[1], seed=0)
            again = run_cell(suite, cell, tmp_path)
            assert again.value == pytest.approx(record.value, abs=1e-3)
            assert (again.settings, again.weights) == (record.settings, record.weights)


def test_no_cell_is_started_after_ctrl_c(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(futures: Iterable[object]) -> Iterator[object]:
        yield from itertools.islice(as_completed(futures), 1)
        raise KeyboardInterrupt

    as_completed = runner.as_completed
    monkeypatch.setattr(runner, "as_completed", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(str(study.file), study.backbones[:1], range(20), tmp_path, opts=["TRANSFER.SETS.areas", "null"])
    assert len(read_records(tmp_path)) <= 2  # of 60: the first one, and the one that goes on meanwhile


pool = runner.ProcessPoolExecutor


def test_a_worker_that_dies_takes_one_cell_with_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the system kills for its memory; the next cell has a new one."""

    def kill_after_the_first(futures: Iterable[object]) -> Iterator[object]:
        for number, future in enumerate(as_completed(futures)):
            if number == 0:
                for pid in set(processes(os.getpid())) - others:
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
            yield future

    as_completed, others = runner.as_completed, set(processes(os.getpid()))
    monkeypatch.setattr(runner, "as_completed", kill_after_the_first)
    opts = ["TRANSFER.SETS.areas", "null", "TRANSFER.SETS.boxes", "null"]
    with pytest.raises(ConfigError, match=r"(?s)^1 of 8 cells failed.*BrokenProcessPool"):
        measure(str(study.file), study.backbones[:1], range(4), tmp_path, opts=opts)
    assert len(read_records(tmp_path)) == 7


def test_workers_that_do_not_start_are_not_tried_for_ever(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    monkeypatch.setattr(runner, "_start_worker", os._exit)  # as one whose imports fail
    monkeypatch.setattr(
        runner, "ProcessPoolExecutor", lambda *args, **kwargs: tried.append(args) or pool(*args, **kwargs)
    )
    opts = ["TRANSFER.SETS.areas", "null", "TRANSFER.SETS.boxes", "null"]
    with pytest.raises(ConfigError, match="8 of 8 cells failed"):
        measure(str(study.file), study.backbones[:1], range(4), tmp_path, opts=opts)
    assert len(tried) == runner.MOST_FAILED_STARTS


# What is measured again


def test_finished_cells_are_done(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    before = study.files()
    found = study.dry_run(capsys)
    assert len(found) == 15
    assert {name for name, done in found.items() if not done} == {name for name in found if "diverging" in name}
    assert study.files() == before  # half-written ones that the killed process left are neither read nor in the way


def test_cells_of_other_settings_are_to_do(
    study: Study, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = study.dry_run(capsys, "TRANSFER.PROTOCOLS.knn.K", "1")
    assert {name for name, done in found.items() if not done and "diverging" not in name} == {
        f"pics, knn, {name}, seed 0" for name in ("random", "squeezed", "expanded/boxes")
    }
    assert "random-0.json is of other weights or settings: it is measured again" in caplog.text


def test_cells_of_other_weights_are_to_do(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    other = study.student("other.pth", seed=9)
    copy = study.root / "copy.pth"
    copy.write_bytes((study.root / "student.pth").read_bytes())
    opts = ["TRANSFER.SETS.areas", "null"]
    assert not any(study.dry_run(capsys, *opts, weights=[f"squeezed={other}"]).values())
    assert all(study.dry_run(capsys, *opts, weights=[f"squeezed={copy}", "random=random"]).values())


def test_a_cell_that_is_measured_again_uses_the_new_data(study: Study, tmp_path: Path) -> None:
    """The features of the old data are on disk, for backbones and protocols that have them in common."""
    for name in ("dog", "eel"):
        target = tmp_path / "two" / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(study.root / "data/pics" / name)
    cell = Cell(set_name="pics", protocol="probe", backbone=study.backbones[1], seed=0)
    before = run_cell(study.parse(), cell, tmp_path)
    after = run_cell(study.parse("XLEARNER.DATASETS.s_pics.IMAGES", tmp_path / "two"), cell, tmp_path)
    assert (before.details["num_train"], after.details["num_train"]) == (8, 5)
    assert before.settings != after.settings
    assert len(list((tmp_path / "cache/pics").iterdir())) == 2


def test_what_counts_is_what_the_suite_names_first_now(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of backbones that were measured before the order was changed, without measuring them again."""
    suite = study.parse()
    for protocol in ("probe", "knn"):
        run_cell(suite, Cell(set_name="pics", protocol=protocol, backbone=study.backbones[0], seed=0), tmp_path)
    assert analyse(read_records(tmp_path), subject="random").primary == {"pics": "probe"}
    monkeypatch.setattr(measuring, "run_cells", lambda cells, **_: {})
    opts = ["TRANSFER.SETS.pics.PROTOCOLS", "[knn, probe]"]
    measure(str(study.file), study.backbones[1:2], [0], tmp_path, opts=opts, dry_run=True)
    assert analyse(read_records(tmp_path), subject="random").primary == {"pics": "probe"}
    measure(str(study.file), study.backbones[1:2], [0], tmp_path, opts=opts)
    assert analyse(read_records(tmp_path), subject="random").primary == {"pics": "knn"}


def test_a_record_that_cannot_be_read_stops_a_study(study: Study, tmp_path: Path) -> None:
    suite = study.parse()
    cell = Cell(set_name="pics", protocol="probe", backbone=study.backbones[0], seed=0)
    cell.file(tmp_path).parent.mkdir(parents=True)
    cell.file(tmp_path).write_text('{"schema": 1')
    with pytest.raises(ConfigError, match=r"probe/random-0\.json is no record of a transfer cell"):
        unfinished(suite, [cell], tmp_path)


def test_whole_seeds_first_and_then_what_counts(study: Study) -> None:
    suite = study.parse()
    cells = all_cells(suite, study.backbones[:2], [0, 1])
    assert [cell.seed for cell in cells] == [0] * 10 + [1] * 10
    counting = [cell.protocol for cell in cells[:6]]
    assert counting == ["probe", "probe", "dense", "dense", "linear", "linear"]
    assert len({cell.file(Path()) for cell in cells}) == len(cells)


# Before anything is written


def test_nothing_is_written_when_the_command_is_wrong(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for opts, weights, message in (
        (["TRANSFER.SETS.pics.PROTOCOLS", "[prob]"], "random=random", "the unknown protocol 'prob'"),
        (["TRANSFER.SETS.pics.TEST"], "random=random", "should be pairs of key and value"),
        (["TRANSFER.SETS.pic.TEST", "x"], "random=random", "there is no such record. Did you mean 'pics'"),
        (["TRANSFER.PROTOCOLS.dense.OPTS", "[SOLVER.STEPZ, 1]"], "random=random", "TRANSFER.PROTOCOLS.dense"),
        ([], "squeezed=gone.pth", "--weights squeezed: there is no file gone.pth"),
    ):
        with pytest.raises(ConfigError) as caught:
            measure(str(study.file), parse_backbones([weights]), [0], out, opts=opts)
        assert message in str(caught.value)
    assert not out.exists()


# The command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """tools/transfer.py in this process."""
    monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools/transfer.py"), run_name="__main__")


def test_a_failing_cell_gives_an_exit_code_and_its_name(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "run_cells", lambda cells, **_: {cells[0]: FloatingPointError("NaN")})
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--suite", study.file, "--output", study.out, "--seeds", 1)
    assert str(caught.value.code) == (
        "error: 1 of 1 cells failed; what failed first has 1 problem:\n"
        "  1. areas, diverging, random, seed 0: FloatingPointError('NaN')"
    )


def test_a_dry_run_of_the_command(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite", study.file, "--output", study.out, "--dry-run", "--first-seed", 0, "--seeds", 2]
    command(monkeypatch, *arguments, "--weights", *study.weights, "--opts", "TRANSFER.SETS.areas", "null")
    out = capsys.readouterr().out
    assert "done   pics, knn, expanded/boxes, seed 0" in out
    assert "to do  boxes, dense, random, seed 1" in out
    assert "areas" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a.pth", "=b"], "error: The command line has 2 problems:\n  1. --weights 'a.pth': NAME=PATH"),
        (["--weights", "a=gone.pth", "a=random"], "error: The command line has 2 problems:\n  1. --weights gives 'a'"),
        (["--subject", "squeezed"], "The subject is 'squeezed', but the backbones are random."),
        (["--opts", "TRANSFER.NAM", "x"], "There is no setting TRANSFER.NAM (below TRANSFER). Did you mean 'NAME'?"),
    ],
)
def test_errors_of_the_command(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--suite", study.file, "--output", tmp_path / "out", *arguments)
    assert message in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_found_before_anything_is_measured(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--suite", study.file, "--output", tmp_path / "file/out", "--weights", "random=random")
    assert f"--output is {tmp_path}/file/out, which is no folder that can be made or written to." in str(
        caught.value.code
    )


def test_a_network_that_cannot_be_built(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = ["--opts", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--suite", study.file, "--output", tmp_path / "out", "--weights", "a=random", *deep)
    assert "RES2_OUT_CHANNELS = 64" in str(caught.value.code)


def test_adding_a_backbone_leaves_the_subject(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged: list[str] = []
    monkeypatch.setattr("xlearner_d2.commands.transfer.measure", lambda *args, **options: None)
    monkeypatch.setattr("xlearner_d2.commands.transfer.report_folder", lambda folder, subject: judged.append(subject))
    command(monkeypatch, "--suite", study.file, "--output", study.out, "--weights", "single/new=random")
    assert judged == ["squeezed"]


@pytest.mark.parametrize("missing", ["git", "repository"])
def test_cells_are_kept_without_git(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("git")

    if missing == "git":
        monkeypatch.setattr(provenance.subprocess, "run", gone)
    else:
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a/b/c.py"))
    assert commit() == ""


@pytest.mark.parametrize(
    ("option", "kind", "value"),
    [
        *((option, "positive", value) for option in ("--seeds", "--jobs") for value in ("0", "-1", "two")),
        *(("--first-seed", "seed", value) for value in ("-1", "two")),
    ],
)
def test_counts_are_positive_and_seeds_not_below_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, kind: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--suite", "x.yaml", option, value)
    assert caught.value.code == 2
    assert f"argument {option}: invalid {kind} value: '{value}'" in capsys.readouterr().err
