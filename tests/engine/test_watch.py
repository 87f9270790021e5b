"""What a user sees of a run: the line, metrics.json across a resume, TensorBoard, Weights & Biases."""

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage, EventWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.engine.stopping import RunStopped
from xlearner_d2.engine.watch import JsonLines, ProgressLine, Watch, in_words, make_writers, memory_gb


class Trainer(TrainerBase):
    """Logs the step's number as its loss, and stops where it is told to."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.stop = stop

    def run_step(self) -> None:
        if self.iter == self.stop:
            raise RunStopped("enough")
        values = {"total_loss": 10.0 + self.iter % 7, "birds/total_loss": 1.0, "lr": 0.5**self.iter}
        for name, value in values.items():
            self.storage.put_scalar(name, value, smoothing_hint=name != "lr")


def watched(folder: Path, *, period: int, stop: int | None = None) -> tuple[Trainer, Watch]:
    trainer = Trainer(stop)
    watch = Watch(lambda written: make_writers(folder, max_iter=30, written=written), period=period)
    trainer.register_hooks([watch])
    return trainer, watch


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "memory_gb"} for line in found]


@settings(max_examples=10)
@given(saved=st.integers(0, 29), lost=st.integers(0, 10), period=st.integers(1, 9), torn=st.booleans())
def test_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, saved: int, lost: int, period: int, torn: bool
) -> None:
    """The state after step ``saved`` is kept, some steps more are run and lost, and a line may be half written."""
    root = tmp_path_factory.mktemp("metrics")
    watched(root / "alone", period=period)[0].train(0, 30)
    trainer, watch = watched(root / "killed", period=period, stop=saved + 1)
    with suppress(RunStopped):
        trainer.train(0, 30)
    state = watch.state_dict()
    with (root / "killed/metrics.json").open("a") as file:
        for step in range(saved + 1, saved + 1 + lost):
            file.write(json.dumps({"iteration": step, "total_loss": 0}) + "\n")
    if torn:
        with (root / "killed/metrics.json").open("a") as file:
            file.write('{"iteration": 2, "total_')
    trainer, watch = watched(root / "killed", period=period)
    watch.load_state_dict(state)
    trainer.train(saved + 1, 30)
    assert lines(root / "killed/metrics.json") == lines(root / "alone/metrics.json")


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 3}\n')
    JsonLines(tmp_path / "metrics.json", written=-1).close()
    assert (tmp_path / "metrics.json").read_text() == ""


def filled(step: int) -> EventStorage:
    storage = EventStorage(step)
    scalars = {"total_loss": 3.412, "birds/total_loss": 2.1, "cells/total_loss": 0.9, "cells/loss_box": 0.4}
    scalars |= {"time": 0.5, "data_time": 0.01, "images": 31, "lr": 9.4e-4}
    for name, value in scalars.items():
        storage.put_scalar(name, value)
    for name, value in {"images_per_second": 62.0, "data_wait": 0.014, "memory_gb": 1.94}.items():
        storage.put_scalar(name, value, smoothing_hint=False)
    return storage


def test_the_line_reads_like_a_sentence() -> None:
    with filled(139) as storage:
        line = ProgressLine(600).line(storage)
    assert line == (
        "step 140/600, 23% · loss 3.41 (birds 2.1, cells 0.9) · 62 images/s, waiting for data 1% · "
        "1.9 GB · lr 0.00094 · 4 min left"
    )


def test_a_line_without_any_figures_yet() -> None:
    with EventStorage(0) as storage:
        assert ProgressLine(600).line(storage) == "step 1/600, 0%"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(("ci", "most"), [("", 50), ("true", 6)])
def test_a_handful_of_lines_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ci: str, most: int
) -> None:
    monkeypatch.setenv("CI", ci)
    caplog.set_level(logging.INFO)
    printer = ProgressLine(1000)
    for step in [*range(19, 1000, 20), 999, 1000]:
        with filled(step):
            printer.write()
    shown = [message for message in caplog.messages if message.startswith("step")]
    assert len(shown) == most
    assert shown[-1].startswith("step 1000/1000, 100%")


def test_values_kept_in_memory_are_limited(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.register_hooks([Watch(lambda written: [], period=100)])
    trainer.train(0, 3000)
    assert len(trainer.storage.history("total_loss").values()) == 1000
    assert memory_gb() > 0


def test_a_full_disk_ends_the_run_with_the_file_s_name(tmp_path: Path) -> None:
    class Full(EventWriter):
        def write(self) -> None:
            raise OSError(28, "No space left on device", "out/metrics.json")

    trainer = Trainer()
    trainer.register_hooks([Watch(lambda written: [Full()], period=3)])
    with pytest.raises(RunStopped) as caught:
        trainer.train(0, 9)
    assert "out/metrics.json could not be written: No space left on device. Make room" in caught.value.message
    assert (caught.value.code, trainer.iter) == (1, 2)


class FakeRun:
    def __init__(self) -> None:
        self.id, self.rows, self.closed = "abc", [], False

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.closed = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of that name, which remembers its calls."""
    seen = SimpleNamespace(runs=[], options=[])

    def init(**options: Any) -> FakeRun:
        seen.options.append(options)
        seen.runs.append(FakeRun())
        return seen.runs[-1]

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_weights_and_biases_gets_each_step_once_and_the_run_goes_on(wandb: SimpleNamespace, tmp_path: Path) -> None:
    def part(start: int, end: int, state: dict[str, Any] | None) -> dict[str, Any]:
        trainer = Trainer(stop=end)
        watch = Watch(
            lambda written: make_writers(tmp_path / "out/expand", max_iter=30, written=written, wandb_project="birds"),
            period=5,
        )
        trainer.register_hooks([watch])
        if state:
            watch.load_state_dict(state)
        with pytest.raises(RunStopped):
            trainer.train(start, 30)
        return watch.state_dict()

    state = part(0, 10, None)
    part(10, 20, state)
    assert [(of["project"], of["name"], of["id"]) for of in wandb.options] == [
        ("birds", "out expand", None),
        ("birds", "out expand", "abc"),
    ]
    assert [step for run in wandb.runs for step, _ in run.rows] == [4, 9, 14, 19]
    assert wandb.runs[0].rows[0][1]["birds/total_loss"] == 1
    assert all(run.closed for run in wandb.runs)


def test_the_run_of_a_trunk_is_one_of_the_run_around_it(wandb: SimpleNamespace, tmp_path: Path) -> None:
    make_writers(tmp_path / "out/trunk/expand", max_iter=30, written=-1, wandb_project="birds")
    assert [(of["name"], of["group"]) for of in wandb.options] == [("out trunk", "out")]
