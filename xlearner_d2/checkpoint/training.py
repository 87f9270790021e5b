"""Checkpoints of a running stage: written atomically, read without running code, loaded strictly."""

from pathlib import Path
from typing import Any

from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer, _IncompatibleKeys
from torch import nn

from .export import save_atomically
from .load import load_strictly, read_checkpoint


class TrainingCheckpointer(Checkpointer):
    """fvcore's checkpointer with this project's reading and writing.

    Args:
        model: whose state is kept under ``"model"``; wrapped in DDP or not.
        save_dir: folder of the stage.
        checkpointables: further objects with ``state_dict`` and ``load_state_dict``, by name.
    """

    def __init__(self, model: nn.Module, save_dir: str, **checkpointables: Any):
        super().__init__(model, save_dir, save_to_disk=comm.is_main_process(), **checkpointables)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` and make it the one that resuming starts from."""
        if not self.save_to_disk:
            return
        state = {key: thing.state_dict() for key, thing in self.checkpointables.items()}
        save_atomically({"model": self.model.state_dict(), **state, **kwargs}, f"{self.save_dir}/{name}.pth")
        self.tag_last_checkpoint(f"{name}.pth")
        self.logger.info(f"Saved checkpoint {self.save_dir}/{name}.pth.")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last, at once: a run killed here still finds the old note or the new one."""
        part = Path(self.save_dir) / ".last_checkpoint.part"
        part.write_text(last_filename_basename)
        part.replace(Path(self.save_dir) / "last_checkpoint")

    def _load_file(self, f: str) -> dict[str, Any]:
        self._path = f
        return read_checkpoint(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        load_strictly(self.model, checkpoint.pop("model"), path=self._path)
        return _IncompatibleKeys([], [], [])
