"""Weights & Biases, for those who have it installed and ask for it with ``XLEARNER.WANDB``."""

from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint.files import write_atomically


class WandbWriter(EventWriter):
    """Log the scalars of a stage as a run of its own, which a resumed stage continues.

    Args:
        folder: of the stage: its name and that of the run's folder name the run.
        project: to log to.
        written: the last step that was logged before, -1 if none.
    """

    def __init__(self, folder: Path, *, project: str, written: int, window_size: int = 20):
        import wandb  # type: ignore[import-not-found]

        note = folder / "wandb_run"
        known = note.read_text().strip() if note.is_file() and written >= 0 else None
        output, stage = folder.absolute().parent, folder.name
        if output.name == "trunk":  # a run within another one
            output, stage = output.parent, "trunk"
        self._run = wandb.init(
            project=project,
            name=f"{output.name} {stage}",
            group=output.name,
            dir=str(folder),
            id=known,
            resume="allow" if known else None,
        )
        write_atomically(self._run.id, note)
        self._last_write = written
        self._window_size = window_size

    def write(self) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if step > self._last_write:
                by_step.setdefault(step, {})[name] = value
        for step, values in sorted(by_step.items()):
            self._run.log(values, step=step)
            self._last_write = step

    def close(self) -> None:
        self._run.finish()
