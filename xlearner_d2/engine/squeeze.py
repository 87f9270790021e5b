"""The squeeze stage: a hook that distils the expanded backbone into a plain network, and what it needs to run alone."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.nn.precise_bn import update_bn_stats
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..checkpoint.export import export_student
from ..checkpoint.files import write_atomically
from ..checkpoint.load import load_strictly
from ..checkpoint.training import TrainingCheckpointer
from ..data.loader import start_at
from ..modeling import XLearner
from ..modeling.distill import Distiller, matched_stages
from ..modeling.expanded import TRUNK
from ..modeling.weighting import weights_of
from ..modeling.xlearner import autocast, autocast_dtype
from .branches import load_expanded, student_config
from .evaluate import SourceResults, evaluate_sources
from .failure import stop_at_failure
from .norm_statistics import WorkerStatistics, share_norm_statistics
from .optimizer import make_optimizer, make_schedule
from .plan import STUDENT_FILE, Plan, expanded_file
from .provenance import describe_training
from .squeeze_settings import hint_factors, squeeze_batches, squeeze_config
from .steps import StepTrainer
from .stopping import stopping_when_full
from .student import build_learner, build_student, freeze_idle, initialise_student
from .trainer import StepSeed, build_loader, build_step_trainer, resume, stage_hooks, weigh
from .workers import patient_group, wait_for_all

logger = logging.getLogger(__name__)

#: In the folder of the stage: what the student has on the sources' test data, with the heads it was squeezed with.
SOURCE_RESULTS = "squeezed.json"


class SqueezeHook(HookBase):
    """One distillation step after each step of whatever trainer it is attached to; at the end, export the student.

    The step itself is Detectron2's own trainer, with its mixed precision and its logging, around a
    :class:`Distiller`. All state is in :meth:`state_dict`, so the outer trainer's checkpoints hold it.

    Args:
        trainer: steps a distiller with an optimiser and batches of its own.
        scheduler: of that optimiser's learning rate, stepped once a step.
        recalibration: loader of the images over which the student's BN statistics are estimated at the end.
        recalibration_batches: how many batches of them; 0 keeps the running averages.
        finish: called by all workers at the end, when the student is what is to be exported.
        average: running average of the weights of :attr:`learner`, which it ends with; None for none.
    """

    def __init__(
        self,
        *,
        trainer: StepTrainer,
        scheduler: Any,
        recalibration: Iterable[Any],
        recalibration_batches: int,
        finish: Callable[[], None],
        average: ModelEmaV3 | None = None,
    ):
        self.inner = trainer
        self.scheduler = scheduler
        self.recalibration = recalibration
        self.recalibration_batches = recalibration_batches
        self.finish = finish
        self.average = average

    @property
    def distiller(self) -> Distiller:
        return getattr(self.inner.module, "model", self.inner.module)  # without what weighs its losses

    @property
    def learner(self) -> nn.Module:
        """What is trained for good, projectors left out: the student, with its heads if it has any."""
        return self.distiller.learner or self.distiller.student

    def after_step(self) -> None:
        self.inner.iter = self.trainer.iter
        rate = self.inner.optimizer.param_groups[0]["lr"]
        name = f"{self.inner.scope}/lr" if self.inner.scope else "lr"
        self.trainer.storage.put_scalar(name, rate, smoothing_hint=False)
        self.inner.run_step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.learner, step=self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # stopped early: the checkpoint holds the state, there is nothing to export yet
        if self.average is not None:
            self.learner.load_state_dict(self.average.module.state_dict())
        recalibrate(self.distiller, self.recalibration, self.recalibration_batches)
        share_norm_statistics(self.learner)
        self.finish()
        wait_for_all()

    def state_dict(self) -> dict[str, Any]:
        trainer = self.inner.state_dict()
        trainer.pop("iteration")
        weights = {name: of.state_dict() for name, of in weights_of(self.inner.module).items()}
        average = {} if self.average is None else {"average": self.average.module.state_dict()}
        return {
            "distiller": self.distiller.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "weights": weights,
            **average,
            **trainer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        where = "the squeeze stage's checkpoint"
        load_strictly(self.distiller, state["distiller"], path=where)
        if self.average is not None:
            load_strictly(self.average.module, state.get("average", {}), path=f"{where} (XLEARNER.SQUEEZE.EMA_DECAY)")
        self.scheduler.load_state_dict(state["scheduler"])
        for name, of in weights_of(self.inner.module).items():
            of.load_state_dict(state["weights"][name])
        own = ("distiller", "scheduler", "weights", "average")
        self.inner.load_state_dict({"iteration": 0, **{key: value for key, value in state.items() if key not in own}})


class HookTrainer(TrainerBase):
    """A trainer whose hooks do all the work: the offline squeeze."""

    def run_step(self) -> None:
        """Nothing of its own."""


@torch.no_grad()
def recalibrate(distiller: Distiller, loader: Iterable[Any], count: int) -> None:
    """Replace the running averages of the student's BN by its statistics over batches of the source mix.

    Args:
        distiller: its teacher knows how the sources' images are prepared and grouped.
        loader: gives ``{source: records}``; the images of one size among them are one batch.
        count: number of such batches.
    """
    if not count:
        return
    student, teacher = distiller.student, distiller.teacher
    training = student.training
    student.train()

    def images() -> Iterator[Tensor]:
        for batches in loader:
            yield from (group.images for group in teacher.image_groups(batches, together=True))

    with autocast(teacher.device, distiller.autocast_dtype):
        update_bn_stats(student, images(), count)
    student.train(training)


def build_squeeze_hook(
    plan: Plan, teacher: XLearner, batches: Iterable[Any], *, max_iter: int, scope: str = ""
) -> SqueezeHook:
    """A hook that squeezes ``teacher`` with ``batches``, over ``max_iter`` steps.

    Args:
        teacher: frozen, or (online) still being trained.
        batches: an iterable of ``{source: records}``.
        scope: prefix of what is logged.
    """
    cfg = squeeze_config(plan.cfg)
    cfg.SOLVER.MAX_ITER = max_iter
    squeeze = cfg.XLEARNER.SQUEEZE
    stage = squeeze_batches(cfg)
    learner = build_learner(plan, teacher, stage, scope=scope) if squeeze.TASK_LOSSES else None
    student = learner.backbone.branch(TRUNK) if learner else build_student(plan)
    initialise_student(student, plan, teacher)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        stage_weights=matched_stages(squeeze.STAGES, squeeze.STAGE_WEIGHTS),
        teacher_stages=dict(zip(squeeze.STAGES, squeeze.TEACHER_STAGES, strict=True)),
        normaliser=squeeze.NORMALISER,
        distance=squeeze.DISTANCE,
        projector_layers=squeeze.PROJECTOR_LAYERS,
        hint_weight=squeeze.HINT_WEIGHT,
        task_weights=hint_factors(cfg, teacher.backbone.tasks, {s.task for s in plan.drawn[stage].sources}),
        own_images=squeeze.OWN_IMAGES,
        learner=learner,
        autocast_dtype=autocast_dtype(cfg),
    )
    freeze_idle(distiller, plan, stage)
    weighed = weigh(plan, distiller, stage) if learner else distiller
    optimizer = make_optimizer(cfg, weighed)
    path = Path(cfg.OUTPUT_DIR) / STUDENT_FILE

    def finish() -> None:
        folder, results = plan.stage_dir(stage), {}
        if learner is not None:
            results = evaluate_sources(learner, plan, plan.drawn[stage].sources, folder=folder / "inference_squeezed")
        if comm.is_main_process():
            write_atomically(json.dumps(results, indent=2) + "\n", folder / SOURCE_RESULTS)
            export_student(student, student_config(plan.cfg, plan.tasks), path, training=describe_training(plan))
            logger.info(f"The student is in {path}.")

    if teacher.frozen:  # after all that starts as parts of the teacher
        teacher.keep_in(distiller.autocast_dtype)
    trainer = build_step_trainer(cfg, weighed, batches, optimizer, scope=scope)
    trainer.on_non_finite = stop_at_failure(plan, "squeeze", {"expand": teacher, "squeeze": weighed})
    decay = squeeze.EMA_DECAY
    average = ModelEmaV3(learner or student, decay=decay, use_warmup=True) if decay else None
    return SqueezeHook(
        trainer=trainer,
        scheduler=make_schedule(cfg, optimizer),
        recalibration=build_loader(plan, stage, seed_offset=1),
        recalibration_batches=squeeze.BN_RECALIBRATION_BATCHES,
        finish=finish,
        average=average,
    )


def _evaluation(plan: Plan, learner: XLearner, folder: Path) -> hooks.EvalHook:
    """Of the student with its heads, on the way; its norms have the running statistics of training then."""

    def evaluate() -> SourceResults:
        share_norm_statistics(learner)
        with stopping_when_full():
            sources = plan.drawn["squeeze"].sources
            return evaluate_sources(learner, plan, sources, folder=folder / "inference_squeezed")

    return hooks.EvalHook(plan.cfg.TEST.EVAL_PERIOD, evaluate, eval_after_train=False)


def load_teacher(plan: Plan) -> XLearner:
    """The expanded model of an earlier stage, loaded as it was trained and frozen."""
    path = expanded_file(plan.cfg)
    model = build_model(plan.cfg)
    logger.info(f"The teacher is {path}: {load_expanded(model, plan.cfg, path)}.")
    return model.freeze()


def squeeze(plan: Plan, *, resume_run: bool) -> None:
    """Distil the expanded model of this run, or of ``XLEARNER.SQUEEZE.TEACHER``, and export the student."""
    folder = plan.stage_dir("squeeze")
    if resume_run and (Path(plan.cfg.OUTPUT_DIR) / STUDENT_FILE).is_file():
        logger.info("The squeeze stage is done already.")
        return
    seed_all_rng(max(plan.cfg.SEED, 0))
    teacher = load_teacher(plan)
    cfg = squeeze_config(plan.cfg)
    max_iter = cfg.SOLVER.MAX_ITER
    loader = build_loader(plan, "squeeze")
    hook = build_squeeze_hook(plan, teacher, loader, max_iter=max_iter)
    trainer = HookTrainer()
    trainer.register_hooks([StepSeed(max(plan.cfg.SEED, 0)), hook, hooks.IterationTimer()])  # the timer times the hook
    if learner := hook.distiller.learner:
        trainer.register_hooks([_evaluation(plan, learner, folder)])
    statistics = WorkerStatistics([hook.distiller])
    checkpointer = TrainingCheckpointer(
        hook.distiller.student, str(folder), group=patient_group(), trainer=trainer, worker_statistics=statistics
    )
    trainer.register_hooks(stage_hooks(cfg, checkpointer, folder, max_iter=max_iter, trainers=[hook.inner]))
    start = resume(trainer, checkpointer, wanted=resume_run)
    start_at(loader, start)
    trainer.train(start, max_iter)
