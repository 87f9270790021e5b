"""Checkpoints of a running stage: written atomically, read without running code, checked, loaded strictly."""

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer, _IncompatibleKeys
from torch import nn
from torch.distributed import ProcessGroup

from ..specs import ConfigError
from .files import SaveError, remove_parts, save_atomically, write_atomically
from .load import load_strictly, read_checkpoint

logger = logging.getLogger(__name__)


class TrainingCheckpointer(Checkpointer):
    """fvcore's checkpointer with this project's reading and writing. All workers call it; the main one writes.

    Args:
        model: whose state is kept under ``"model"``; wrapped in DDP or not.
        save_dir: folder of the stage.
        checkpointables: further objects with ``state_dict`` and ``load_state_dict``, by name. They are loaded in this
            order, after the model.
        group: in which the others wait for the main worker while it reads and writes; None for the default one.
    """

    #: How many checkpoints are kept: the one before the last is used when the last is damaged.
    KEPT = 2

    def __init__(self, model: nn.Module, save_dir: str, *, group: ProcessGroup | None = None, **checkpointables: Any):
        super().__init__(model, save_dir, save_to_disk=comm.is_main_process(), **checkpointables)
        self.group = group

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, make it the one that resuming starts from, and remove older ones.

        Raises:
            SaveError: on all workers, when the main one could not write.
        """
        state = {key: thing.state_dict() for key, thing in self.checkpointables.items()}  # workers may exchange theirs
        problem = ""
        if self.save_to_disk:
            try:
                self._write(name, {"model": self.model.state_dict(), **state, **kwargs})
            except SaveError as error:
                problem = str(error)
        problem = comm.all_gather(problem, group=self.group)[0]
        if problem:
            raise SaveError(problem)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        save_atomically(state, f"{self.save_dir}/{name}.pth")
        self.tag_last_checkpoint(f"{name}.pth")
        # By age, not by step: after a fall back to an earlier checkpoint, the damaged one has a later step.
        for path in sorted(self.checkpoints(), key=lambda path: path.stat().st_mtime_ns)[: -self.KEPT]:
            path.unlink(missing_ok=True)
        logger.info(f"Saved checkpoint {self.save_dir}/{name}.pth.")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last, at once: a run killed here still finds the old note or the new one."""
        write_atomically(last_filename_basename, Path(self.save_dir) / "last_checkpoint")

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the folder, the one that is noted as the last first, then from new to old."""
        noted = Path(self.get_checkpoint_file()).name if self.has_checkpoint() else ""
        return sorted(
            Path(self.save_dir).glob("model_*.pth"),  # a failed step may lie beside them
            key=lambda path: (path.name == noted, _step(path)),
            reverse=True,
        )

    def load_last(self) -> Path | None:
        """Load the last checkpoint that is whole; None if there is none at all.

        Raises:
            ConfigError: when all are damaged, or one does not fit the model.
        """
        found = self._find_whole() if self.save_to_disk else ("", [])
        # The main worker's: one reads the files, and all use the same.
        path, problems = comm.all_gather(found, group=self.group)[0]
        if path:
            self.load(path)
            return Path(path)
        if problems:
            raise ConfigError(problems, what=f"Resuming from {self.save_dir}")
        return None

    def _find_whole(self) -> tuple[str, list[str]]:
        """The last checkpoint that is whole, if any, and what is wrong with those after it."""
        remove_parts(self.save_dir)
        problems: list[str] = []
        for path in self.checkpoints():
            problem = damage(path)
            if not problem:
                return str(path), problems
            logger.warning(f"{problem} The checkpoint before it is used instead, if there is one.")
            problems.append(problem)
        return "", problems

    def _load_file(self, f: str) -> dict[str, Any]:
        self._path = f
        return read_checkpoint(f)

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        load_strictly(self.model, checkpoint.pop("model"), path=self._path)
        return _IncompatibleKeys([], [], [])


def damage(path: Path) -> str:
    """What is wrong with a checkpoint file, or an empty string. Finds truncation and changed bits."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # torch.load ignores the checksums
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"{path} is damaged ({str(error).rstrip('.')})."
    return f"{path} is damaged (the checksum of {broken} is wrong)." if broken else ""


def _step(path: Path) -> float:
    """The step in a checkpoint's name; that of the last step is named otherwise, see ``Checkpoints``."""
    if path.stem == "model_final":
        return float("inf")
    number = re.fullmatch(r"model_(\d+)", path.stem)
    return int(number[1]) if number else -1
