"""What a user sees of a run while it goes on: one readable line, metrics.json, TensorBoard, and W&B when asked for."""

import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from fvcore.common.history_buffer import HistoryBuffer

from ..checkpoint.files import write_atomically
from .steps import StepTrainer
from .stopping import RunStopped, stopping_when_full

logger = logging.getLogger(__name__)

#: Steps over which what is written is smoothed, as in Detectron2.
WINDOW = 20
#: Values of each scalar that are kept in memory; Detectron2 would keep a million.
_KEPT = 1000
#: Lines per stage where nobody watches.
_QUIET_LINES = 5


class Watch(HookBase):
    """Every so many steps, add speed and memory to what was logged, and have it all written.

    What was written last, and the values that are still to be smoothed over, are in the checkpoint: a resumed run goes
    on without gap or repetition.

    Args:
        make_writers: called with the last step that was written (-1 if none) when training starts; only the main
            worker has any.
        period: in steps.
        trainers: whose losses may still be on their way from other workers.
    """

    def __init__(
        self,
        make_writers: Callable[[int], Sequence[EventWriter]],
        *,
        period: int = 20,
        trainers: Sequence[StepTrainer] = (),
    ):
        self.make_writers = make_writers
        self.period = period
        self.trainers = trainers
        self.written = -1
        self._recent: dict[str, Any] = {}
        self._writers: Sequence[EventWriter] = ()

    def before_train(self) -> None:
        storage = self.trainer.storage
        storage.histories().default_factory = partial(HistoryBuffer, max_length=_KEPT)
        for name, of in self._recent.items():
            for value, step in zip(of["values"], of["steps"], strict=True):
                storage.put_scalar(name, value, smoothing_hint=of["smooth"], cur_iter=int(step))
        self._writers = self.make_writers(self.written)

    def after_step(self) -> None:
        step = self.trainer.iter
        if (step + 1) % self.period and step + 1 != self.trainer.max_iter:
            return
        for trainer in self.trainers:
            trainer.flush()
            trainer.log_weights()
        _put_speed(self.trainer.storage)
        with stopping_when_full():
            for writer in self._writers:
                writer.write()
        self.written = step

    def after_train(self) -> None:
        ending = sys.exception()  # a run that stops early has said why, and that matters more than its last line
        try:
            with stopping_when_full():
                for writer in self._writers:
                    writer.write()
                    writer.close()
        except RunStopped:
            if ending is None:
                raise

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written, "recent": _recent(self.trainer.storage)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.written, self._recent = state["written"], state["recent"]


def _recent(storage: EventStorage) -> dict[str, Any]:
    """The values that later smoothing still needs, by name."""
    hints = storage.smoothing_hints()
    found = {}
    for name, history in storage.histories().items():
        if name == "time":  # not taken in the first steps after a start, so an old one would be written as the latest
            continue
        values = history.values()[-WINDOW:]
        found[name] = {"values": [v for v, _ in values], "steps": [int(s) for _, s in values], "smooth": hints[name]}
    return found


def _put_speed(storage: EventStorage) -> None:
    """Images a second, the share of the time that is spent waiting for data, and memory."""
    time, data, images = (_smoothed(storage, name) for name in ("time", "data_time", "images"))
    if time:
        storage.put_scalar("images_per_second", (images or 0.0) / time, smoothing_hint=False)
        storage.put_scalar("data_wait", min((data or 0.0) / time, 1.0), smoothing_hint=False)
    storage.put_scalar("memory_gb", memory_gb(), smoothing_hint=False)


def _smoothed(storage: EventStorage, name: str) -> float | None:
    if name not in storage.histories():
        return None
    return float(storage.history(name).median(storage.count_samples(name, WINDOW)))


def memory_gb() -> float:
    """The most memory that tensors took on the GPU; where none did, what this process takes now."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return on_gpu / 1e9 if on_gpu else resident_gb()


def resident_gb() -> float:
    """What this process takes of the machine's memory now (its most on macOS)."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


class JsonLines(JSONWriter):
    """Detectron2's ``metrics.json``, which goes on after a step: what was written after it is dropped.

    Args:
        written: the last step that counts; -1 starts anew.
    """

    def __init__(self, path: Path, *, written: int):
        if path.is_file():
            write_atomically("".join(_lines_until(path, written)), path)
        super().__init__(str(path), window_size=WINDOW)
        self._last_write = written


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a ``metrics.json`` up to a step; a line that a killed process left unfinished is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= step:
                kept.append(line)
        except ValueError:
            continue
    return kept


class ProgressLine(EventWriter):
    """One line that a person can read; where nobody watches (the environment variable CI is set), a handful a stage.

    Args:
        max_iter: number of steps of the stage.
        scope: prefix of what the stage's trainer logs.
    """

    def __init__(self, max_iter: int, *, scope: str = ""):
        self.max_iter = max_iter
        self.scope = scope
        self._quiet = bool(os.environ.get("CI"))
        self._part = -1
        self._last = -1

    def write(self) -> None:
        storage = get_event_storage()
        done = min(storage.iter + 1, self.max_iter)
        part = _QUIET_LINES * done // self.max_iter
        if done == self._last or storage.iter >= self.max_iter or (self._quiet and part == self._part):
            return
        self._part, self._last = part, done
        logger.info(self.line(storage))

    def line(self, storage: EventStorage) -> str:
        """Such as ``step 140/600, 23% · loss 3.41 (birds 2.1, cells 0.9) · 62 images/s, waiting for data 1% · …``."""
        done = min(storage.iter + 1, self.max_iter)
        parts = [f"step {done}/{self.max_iter}, {100 * done // self.max_iter}%", self._losses(storage)]
        speed = _smoothed(storage, "images_per_second")
        if speed is not None:
            parts.append(f"{speed:.3g} images/s, waiting for data {_smoothed(storage, 'data_wait') or 0:.0%}")
        memory, rate, time = (_smoothed(storage, name) for name in ("memory_gb", "lr", "time"))
        parts += [f"{memory:.1f} GB"] if memory is not None else []
        parts += [f"lr {rate:.2g}"] if rate is not None else []
        parts += [f"{in_words(time * (self.max_iter - done))} left"] if time is not None else []
        return " · ".join(part for part in parts if part)

    def _losses(self, storage: EventStorage) -> str:
        total = _smoothed(storage, f"{self.scope}total_loss")
        if total is None:
            return ""
        names = [name.removeprefix(self.scope) for name in storage.histories() if name.startswith(self.scope)]
        shares = {
            name.removesuffix("/total_loss").removeprefix("loss_"): _smoothed(storage, f"{self.scope}{name}")
            for name in names
            if name.endswith("/total_loss") or name.startswith("loss_hint_")
        }
        listed = ", ".join(f"{name.replace('hint_', 'hint ')} {value:.3g}" for name, value in shares.items())
        return f"loss {total:.3g}" + (f" ({listed})" if listed else "")


def in_words(seconds: float) -> str:
    """``40 s``, ``7 min``, ``2 h 5 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def make_writers(folder: Path, *, max_iter: int, written: int, wandb_project: str = "") -> list[EventWriter]:
    """What a stage writes to.

    Args:
        folder: of the stage.
        written: the last step that an earlier part of the run has written, -1 if none.
        wandb_project: where to log on Weights & Biases as well; "" for nowhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: list[EventWriter] = [
        ProgressLine(max_iter),
        JsonLines(folder / "metrics.json", written=written),
        TensorBoard(folder, written=written),
    ]
    if wandb_project:
        from .wandb_writer import WandbWriter

        writers.append(WandbWriter(folder, project=wandb_project, written=written))
    return writers


class TensorBoard(TensorboardXWriter):
    """Detectron2's, which goes on after a step: TensorBoard hides what was written after it."""

    def __init__(self, folder: Path, *, written: int):
        purge = {"purge_step": written + 1} if written >= 0 else {}
        super().__init__(str(folder), window_size=WINDOW, **purge)
        self._last_write = written
