"""When a stage saves its state: every so many steps, at the end, and when a signal asks it to stop."""

import sys

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint.files import SaveError
from ..checkpoint.training import TrainingCheckpointer
from .stopping import MAKE_ROOM, RunStopped, StopSignals, exit_code, name_of


class Checkpoints(HookBase):
    """Save what resuming needs. The last of a stage's hooks, as it saves what the others have made of the step.

    Args:
        checkpointer: of the stage.
        period: in steps.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, *, period: int):
        self.checkpointer = checkpointer
        self.period = period
        self.signals = StopSignals()

    def before_train(self) -> None:
        self.signals.install()

    def after_step(self) -> None:
        step, stop = self.trainer.iter, self.signals.agreed()
        last = step + 1 == self.trainer.max_iter
        if last or stop or (step + 1) % self.period == 0:
            self._save("model_final" if last else f"model_{step:07d}")
        if stop:
            done = f"Stopped by {name_of(stop)} after step {step + 1} of {self.trainer.max_iter}"
            kept = f"its state is in {self.checkpointer.get_checkpoint_file()}. Add --resume to go on from there."
            raise _together(f"{done}; {kept}", code=exit_code(stop))

    def after_train(self) -> None:
        self.signals.restore()
        if sys.exception() is not None:
            return
        stop = self.signals.agreed()
        if stop:  # since the last step, as while the student was exported
            raise _together(
                f"Stopped by {name_of(stop)} after the last step. Add --resume to go on.", code=exit_code(stop)
            )

    def _save(self, name: str) -> None:
        try:
            self.checkpointer.save(name)
        except SaveError as error:  # on all workers
            raise _together(f"{error} {MAKE_ROOM}", code=1) from error


def _together(message: str, *, code: int) -> RunStopped:
    """A stop of all workers, of which the main one tells the user."""
    return RunStopped(message if comm.is_main_process() else "", code=code, agreed=True)
