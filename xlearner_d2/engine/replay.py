"""Run the step of a failure file again, and see which loss is not finite and where that begins."""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoint.load import load_strictly
from ..config import default_config
from ..modeling import XLearner
from ..modeling.xlearner import autocast_dtype
from ..specs import ConfigError
from .failure import Failure
from .plan import Plan, make_plan
from .squeeze import build_squeeze_hook
from .trainer import seed_step, weigh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a step gave when it was run again.

    Attributes:
        losses: by name.
        where: the first part of the model with an output that is not finite; "" if there is none.
    """

    losses: dict[str, float]
    where: str

    @property
    def wrong(self) -> list[str]:
        """The losses that are not finite."""
        return [name for name, value in self.losses.items() if not math.isfinite(value)]


def replay(failure: Failure) -> Replay:
    """Run the step of a failure file again, with the weights and the random numbers it had.

    In an online squeeze the random numbers differ, as the expansion's step draws before it does.

    Raises:
        ConfigError: when the data sets of the run are gone, or its config does not fit this version.
    """
    plan = _plan(failure)
    model = _model(plan, failure).train()
    seed_step(max(plan.cfg.SEED, 0), failure.step, rank=failure.rank)
    with EventStorage(), _first_non_finite(model) as found, _precision(plan.cfg):
        try:
            losses = {name: value.item() for name, value in model(failure.batch).items()}
        except FloatingPointError as error:  # Detectron2's, at proposals that are not finite
            losses = {str(error): math.nan}
    return Replay(losses=losses, where=found[0] if found else "")


def describe(failure: Failure, result: Replay) -> str:
    """Both in words and a table."""
    names = [*failure.losses, *(name for name in result.losses if name not in failure.losses)]
    rows = [(name, failure.losses.get(name), result.losses.get(name)) for name in names]
    lines = [
        f"Stage {failure.stage}, step {failure.step}, worker {failure.rank} of {failure.world_size}. {failure.reason}",
        tabulate(rows, headers=["loss", "then", "now"], floatfmt=".5g"),
        "Images: " + "; ".join(_images(failure.batch)),
    ]
    if result.wrong:
        begin = f"begins in {result.where}" if result.where else "begins in the loss itself: see the labels"
        lines.append(f"Not finite: {', '.join(result.wrong)}. It {begin}.")
    else:
        lines.append("All losses are finite now: the device, its precision or the code is not the run's.")
    return "\n".join(lines)


def _images(batch: Any) -> Iterator[str]:
    for source, records in batch.items():
        yield f"{source}: {', '.join(str(record.get('file_name')) for record in records)}"


def _plan(failure: Failure) -> Plan:
    cfg = default_config()
    try:
        cfg.merge_from_other_cfg(CfgNode.load_cfg(failure.config))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError([f"The failure file is of another version, whose config differs: {error}."]) from error
    cfg.XLEARNER.CHECK_IMAGES = 0
    return make_plan(cfg, world_size=failure.world_size)


def _model(plan: Plan, failure: Failure) -> nn.Module:
    model = build_model(plan.cfg)
    assert isinstance(model, XLearner)
    weighed = weigh(plan, model, "expand")
    if plan.growth is not None:
        model.freeze_parts(tasks=plan.cfg.XLEARNER.FREEZE, heads=sorted(plan.growth.frozen))
    if failure.stage == "expand":
        load_strictly(weighed, failure.models["expand"], path="in the failure file")
        return weighed
    load_strictly(model, failure.models["expand"], path="in the failure file")
    distilled: nn.Module = build_squeeze_hook(plan, model.freeze(), [], max_iter=1).inner.module
    load_strictly(distilled, failure.models["squeeze"], path="in the failure file")
    return distilled


def _precision(cfg: CfgNode) -> AbstractContextManager[Any]:
    """That of Detectron2's AMPTrainer on a GPU; on a CPU the model sets its own."""
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    return torch.autocast("cuda", autocast_dtype(cfg), enabled=cfg.SOLVER.AMP.ENABLED) if on_gpu else nullcontext()


@contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order in which they end."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if any(leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()) for leaf in tensors):
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
