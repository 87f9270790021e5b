"""A step whose loss is not finite, kept in a file so that it can be run again."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes
from detectron2.utils import comm
from torch import Tensor, nn

from ..checkpoint.files import SaveError, save_atomically
from ..specs import ConfigError
from .plan import Plan
from .steps import NonFiniteLoss, by_source, copy_statistics, running_statistics
from .stopping import RunStopped
from .workers import wait_briefly_for_all

logger = logging.getLogger(__name__)

#: Seconds in which another worker that failed in the same step has kept its batch.
_TOGETHER = 10.0
#: What a batch consists of besides plain containers, numbers, text and tensors.
_BATCH_TYPES = [
    *(BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes),
    *(np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar),  # type: ignore[attr-defined]
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "uint8", "bool")),
]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a failure file holds.

    Attributes:
        stage: expand or squeeze.
        step: number of the step in that stage, from 0.
        rank, world_size: the worker that met it, and the number of workers.
        reason: in words.
        losses: by name, as they were.
        config: the run's config, as YAML.
        batch: what the model was given.
        models: weights and buffers before the step: of the expanded model ("expand") and of the distiller ("squeeze"),
            the one that was trained with what weighs its losses.
    """

    stage: str
    step: int
    rank: int
    world_size: int
    reason: str
    losses: dict[str, float]
    config: str
    batch: Any
    models: dict[str, dict[str, Any]]


def stop_at_failure(plan: Plan, stage: str, models: Mapping[str, nn.Module]) -> Callable[[NonFiniteLoss], None]:
    """What a stage's trainer does at a loss that is not finite: keep the step in a file, and end the run.

    Args:
        models: all that the stage's losses depend on, by the name of a stage.
    """

    def stop(found: NonFiniteLoss) -> None:
        file = f"failed_step_{found.step:07d}_worker_{{}}.pth"
        failure = Failure(
            stage=stage,
            step=found.step,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            reason=found.reason,
            losses=dict(found.losses),
            config=plan.cfg.dump(sort_keys=False),
            batch=found.batch,
            models={name: _state(model, found) for name, model in models.items()},
        )
        try:
            save_atomically(vars(failure), plan.stage_dir(stage) / file.format(comm.get_rank()))
            # Where workers exchange statistics, what is not finite spreads: the cause may be in the batch of another.
            wait_briefly_for_all(_TOGETHER)
            files = " and ".join(map(str, sorted(plan.stage_dir(stage).glob(file.format("*")))))
            kept = f"The batch and the weights are in {files}: run tools/replay.py on it to see where it comes from."
        except SaveError as error:
            kept = f"The batch could not be kept: {error}"
        raise RunStopped(f"{_sentence(stage, found)} {kept} {_ADVICE}")

    return stop


_ADVICE = (
    "Common causes: a learning rate that is too high (SOLVER.BASE_LR), no SOLVER.CLIP_GRADIENTS, float16 "
    "(XLEARNER.AMP_PRECISION bfloat16 has a larger range), or labels that a loss cannot handle. --resume goes on from "
    "the last checkpoint."
)


def _sentence(stage: str, found: NonFiniteLoss) -> str:
    # The others are in the midst of their step: layers that exchange statistics would wait for them forever.
    guilty = wrong_sources(found.losses) if comm.get_world_size() > 1 else guilty_sources(found)
    of = f" (of source {', '.join(guilty)})" if guilty else ""
    return f"Stage {stage}, step {found.step}{of}: {found.reason}"


def wrong_sources(losses: Mapping[str, float]) -> list[str]:
    """The sources with a loss that is not finite, of losses named ``source/loss``."""
    return [source for source, value in by_source(losses).items() if not math.isfinite(value)]


@torch.no_grad()
def guilty_sources(found: NonFiniteLoss) -> list[str]:
    """The sources of a step that give a loss that is not finite when they are alone.

    In the step itself, one may have spoilt the others: through the statistics of its branch, which they receive
    features of. All may fail alone, as when the weights are spoilt.
    """
    wrong = []
    for source, records in found.batch.items():
        copy_statistics(found.statistics, running_statistics(found.model))
        try:
            losses = found.model({source: records})
        except FloatingPointError:  # Detectron2's, at proposals that are not finite
            wrong.append(source)
            continue
        if not all(bool(loss.isfinite()) for loss in losses.values()):
            wrong.append(source)
    return wrong


def _state(model: nn.Module, found: NonFiniteLoss) -> dict[str, Any]:
    """A model as it was before the step, in which it took running statistics of norm layers already."""
    state = model.state_dict()
    if model is found.model:
        state |= {name: value for name, value in found.statistics.items() if name in state}
    # What weighs losses has numbers of its own beside tensors.
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def read_failure(path: str | Path) -> Failure:
    """Read a failure file, without running code from it.

    Raises:
        ConfigError: when it is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise ConfigError([f"There is no file {path}."], what="The replay")
    try:
        with torch.serialization.safe_globals(_BATCH_TYPES):
            return Failure(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files can raise any
        first = str(error).strip().split("\n")[0]
        raise ConfigError([f"{path} is no whole failure file of a run: {first}"], what="The replay") from error
