"""The expand stage: assemble Detectron2's trainer around the expanded model, and run it."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..checkpoint.export import save_expanded
from ..checkpoint.training import TrainingCheckpointer
from ..data.loader import build_joint_train_loader, start_at
from ..modeling import XLearner
from ..modeling.heads import class_counts
from ..modeling.weighting import weigh_losses, weights_of
from ..modeling.xlearner import autocast_dtype
from .branches import initialise_branches, load_expanded, settle_statistics
from .checkpoints import Checkpoints
from .class_names import class_names
from .evaluate import SourceResults, evaluate_sources
from .failure import stop_at_failure
from .growth import grow
from .norm_statistics import WorkerStatistics, share_norm_statistics
from .optimizer import make_optimizer, make_schedule
from .plan import EXPANDED_FILE, Plan
from .steps import AMPStepTrainer, LossesByBranch, StepTrainer
from .stopping import stopping_when_full
from .watch import Watch, make_writers
from .workers import patient_group, wait_for_all

if TYPE_CHECKING:
    from .squeeze import SqueezeHook

logger = logging.getLogger(__name__)


class StepSeed(HookBase):
    """Seed every random generator at the start of each step, from the run's seed, the step and the rank.

    Proposal sampling, dropout and mixup then draw the same numbers whether the run was interrupted or not.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        seed_step(self.seed, self.trainer.iter, rank=comm.get_rank())


def seed_step(seed: int, step: int, *, rank: int) -> None:
    """Seed every random generator for one step of one worker."""
    seed_all_rng((seed * 1_000_003 + step * 10_007 + rank) % 2**31)


class LatestBatch:
    """A loader that remembers the batch it gave last, for a hook that wants to learn from it as well."""

    def __init__(self, loader: DataLoader[Any]):
        self.loader = loader
        self.batch: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.batch = batch
            yield batch

    def again(self) -> Iterator[Any]:
        """Endlessly the batch that is current when asked."""
        while True:
            yield self.batch


def distributed(model: nn.Module, *, alternating: bool) -> nn.Module:
    """Wrap for gradient averaging when there are several workers; on CPUs too, where Detectron2's helper fails.

    Args:
        alternating: some parameters get no gradient in a step, the same ones on all workers. DDP then looks for them,
            and leaves their gradient None, so that neither momentum nor weight decay moves them.
    """
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=alternating
    )


def build_step_trainer(
    cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, *, scope: str = ""
) -> StepTrainer:
    """The trainer of one model: with mixed precision and loss scaling on GPUs where AMP is on.

    Args:
        scope: prefix of what it logs.
    """
    on_gpu = next(model.parameters()).is_cuda
    wrapped = distributed(model, alternating=cfg.XLEARNER.STEPS == "alternating")
    if cfg.SOLVER.AMP.ENABLED and on_gpu:
        return AMPStepTrainer(wrapped, loader, optimizer, scope=scope, precision=autocast_dtype(cfg) or torch.float32)
    return StepTrainer(wrapped, loader, optimizer, scope=scope)


def weigh(plan: Plan, model: nn.Module, stage: str) -> nn.Module:
    """The model with the weights of its sources' losses as ``XLEARNER.WEIGHTING`` says; itself when they are fixed."""
    options = plan.cfg.XLEARNER.WEIGHTING
    return weigh_losses(
        model,
        options.METHOD,
        {source.name: source.loss_weight for source in plan.drawn[stage].sources},
        temperature=options.TEMPERATURE,
        window=options.WINDOW,
    )


def build_loader(plan: Plan, stage: str, *, seed_offset: int = 0) -> DataLoader[Any]:
    """The joint training loader of a stage, from its first step."""
    return build_joint_train_loader(
        plan.drawn[stage].sources,
        plan.heads,
        {source.name: plan.data[source.name].train for source in plan.drawn[stage].sources},
        seed=max(plan.cfg.SEED, 0) + seed_offset,
        turns=plan.drawn[stage].turns,
        num_workers=plan.cfg.DATALOADER.NUM_WORKERS,
    )


def resume(trainer: TrainerBase, checkpointer: TrainingCheckpointer, *, wanted: bool) -> int:
    """Load the last whole checkpoint when it is wanted and there is one; return the step to start with."""
    found = checkpointer.load_last() if wanted else None
    if found is None:
        return 0
    logger.info(f"Resuming after step {trainer.iter + 1}, from {found}.")
    return trainer.iter + 1


def stage_hooks(
    cfg: CfgNode, checkpointer: TrainingCheckpointer, folder: Path, *, max_iter: int, trainers: Sequence[StepTrainer]
) -> list[HookBase]:
    """Hooks that close a stage's list: what all others logged is written, then all that they hold is saved."""

    def writers(written: int) -> list[EventWriter]:
        if not comm.is_main_process():
            return []
        return make_writers(folder, max_iter=max_iter, written=written, wandb_project=cfg.XLEARNER.WANDB)

    return [Watch(writers, trainers=trainers), Checkpoints(checkpointer, period=cfg.SOLVER.CHECKPOINT_PERIOD)]


def finished(plan: Plan, stage: str, result: str) -> bool:
    """Whether an earlier run of the stage left its result."""
    return (Path(plan.cfg.OUTPUT_DIR) / result).is_file() and plan.stage_dir(stage).is_dir()


def expand(plan: Plan, *, resume_run: bool, start: str = "") -> XLearner:
    """Train all branches, reconciliation layers and heads; save ``expanded.pth``; return the trained model.

    Args:
        start: an expanded checkpoint to start from instead of ``MODEL.WEIGHTS``.
    """
    cfg, folder = plan.cfg, plan.stage_dir("expand")
    seed_all_rng(max(cfg.SEED, 0))
    model = build_model(cfg).to(memory_format=torch.channels_last if cfg.XLEARNER.CHANNELS_LAST else None)
    path = Path(cfg.OUTPUT_DIR) / EXPANDED_FILE
    if resume_run and finished(plan, "expand", EXPANDED_FILE):
        logger.info(f"The expand stage is done already: {path}.")
        load_expanded(model, cfg, path)
        return model
    if plan.growth is None:
        initialise_branches(model, cfg, plan.branches, start=start)
    else:
        logger.info(f"Extending {plan.growth.path}: {grow(model, cfg, plan.growth, plan.branches)}")
    if autocast_dtype(cfg) is torch.float16:
        settle_statistics(model, cfg)
    loader = build_loader(plan, "expand")
    latest = LatestBatch(loader)
    weighed = weigh(plan, model, "expand")
    optimizer = make_optimizer(cfg, weighed)

    def evaluate() -> SourceResults:
        share_norm_statistics(model)
        with stopping_when_full():
            return evaluate_sources(model, plan, plan.sources, folder=folder / "inference")

    # Alternating steps have one branch each, and DDP looks in their losses for the parameters that they leave out.
    learner = weighed if cfg.XLEARNER.STEPS == "alternating" else LossesByBranch(weighed)
    trainer = build_step_trainer(cfg, learner, latest, optimizer)
    trainer.on_non_finite = stop_at_failure(plan, "expand", {"expand": weighed})
    squeezing = _online_squeeze(plan, model, latest)
    trainer.register_hooks(
        [
            StepSeed(max(cfg.SEED, 0)),  # first: everything after it may draw random numbers
            hooks.LRScheduler(optimizer, make_schedule(cfg, optimizer)),
            *squeezing,  # learns from the branches as this step left them
            hooks.IterationTimer(),  # times the squeeze as well
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate, eval_after_train=False),
        ]
    )
    checkpointer = TrainingCheckpointer(
        model,
        str(folder),
        group=patient_group(),
        trainer=trainer,
        worker_statistics=WorkerStatistics([model, *(hook.distiller for hook in squeezing)]),
        **weights_of(weighed),
    )
    trainers = [trainer, *(hook.inner for hook in squeezing)]
    trainer.register_hooks(stage_hooks(cfg, checkpointer, folder, max_iter=cfg.SOLVER.MAX_ITER, trainers=trainers))
    step = resume(trainer, checkpointer, wanted=resume_run)
    start_at(loader, step)
    trainer.train(step, cfg.SOLVER.MAX_ITER)
    trainer.release()
    share_norm_statistics(model)
    if comm.is_main_process():
        classes = {source: class_counts(head) for source, head in plan.heads.items()}
        names = {**({} if plan.growth is None else plan.growth.class_names), **class_names(plan.sources)}
        names = {source: names[source] for source in classes if source in names}
        save_expanded(model, cfg, plan.tasks, path, classes=classes, class_names=names)
        logger.info(f"The expanded model is in {path}.")
    wait_for_all()
    return model


def _online_squeeze(plan: Plan, model: XLearner, latest: LatestBatch) -> "list[SqueezeHook]":
    if not plan.cfg.XLEARNER.SQUEEZE.ONLINE:
        return []
    from .squeeze import build_squeeze_hook

    return [build_squeeze_hook(plan, model, latest.again(), max_iter=plan.cfg.SOLVER.MAX_ITER, scope="squeeze")]
