"""The student: how it is built, what it starts as, and which of its stages learn."""

import logging
from typing import cast

from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.load import load_resnet, load_strictly
from ..checkpoint.pixels import PixelConvention
from ..modeling import XLearner
from ..modeling.branches import Branch, build_branch, compile_stages
from ..modeling.distill import Distiller
from ..modeling.expanded import STAGES, TRUNK
from .branches import fits, learner_config, student_config
from .plan import Plan

logger = logging.getLogger(__name__)


def build_learner(plan: Plan, teacher: XLearner, stage: str, *, scope: str = "") -> XLearner:
    """A model with one trunk, the student, and a head for each source, started as the teacher's where shapes allow.

    Args:
        stage: whose batches it will learn from.
        scope: prefix of what its heads log.
    """
    learner = build_model(learner_config(plan.cfg, plan.tasks))
    if learner.backbone.branch(TRUNK).stage_names != STAGES:  # as deep as the heads read
        learner.backbone.branches[TRUNK] = build_student(plan)
    learner.log_prefix = f"{scope}/" if scope else ""
    for source, head in learner.heads.items():
        own, taught = head.state_dict(), teacher.heads[source].state_dict()
        fitting = {name: value for name, value in taught.items() if name in own and own[name].shape == value.shape}
        head.load_state_dict(fitting, strict=False)
    drawn = {source.name for source in plan.drawn[stage].sources}
    for source in learner.heads.keys() - drawn:  # no image of theirs will come, and DDP waits for every gradient
        learner.heads[source].requires_grad_(False)
    return learner


def build_student(plan: Plan) -> Branch:
    """A plain network with all stages, also those that no head here reads: others will start from it as a whole."""
    student = build_branch(student_config(plan.cfg, plan.tasks), out_features=STAGES)
    if plan.cfg.XLEARNER.COMPILE:
        compile_stages(student, backend=plan.cfg.XLEARNER.COMPILE)
    return student


def initialise_student(student: Branch, plan: Plan, teacher: XLearner) -> None:
    """Start the student as ``XLEARNER.SQUEEZE.INIT`` says; as a branch as far as that goes."""
    start = plan.cfg.XLEARNER.SQUEEZE.INIT or _fitting_branch(student, plan, teacher)
    if start in teacher.backbone.tasks:
        branch = teacher.backbone.branch(teacher.backbone.branch_of[start])
        state = {**student.state_dict(), **branch.state_dict()}
        load_strictly(student, state, path=f"of branch {start} (XLEARNER.SQUEEZE.INIT)")
        rest = ", ".join(stage for stage in student.stage_names if stage not in branch.stage_names)
        beyond = f", and {rest}, which that has not, at random" if rest else ""
        logger.info(f"The student starts as the branch of task {start}{beyond}.")
    elif start != "random":
        report = load_resnet(student, start, pixels=PixelConvention.of(plan.cfg))
        logger.info(f"Starting the student from {start}: {report}.")


def _fitting_branch(student: Branch, plan: Plan, teacher: XLearner) -> str:
    """The task of the first source of classes, or of the first source; "random" where its branch is built otherwise.

    Classes take longest to learn: a student that starts elsewhere has to begin them anew (docs/EXPERIMENTS.md).
    """
    classes = [s.task for s in plan.sources if plan.heads[s.name].MODEL.META_ARCHITECTURE == "ImageClassifier"]
    task = next(iter(classes), teacher.backbone.tasks[0])
    return task if fits(teacher.backbone.branch(teacher.backbone.branch_of[task]), student) else "random"


def freeze_idle(distiller: Distiller, plan: Plan, stage: str) -> None:
    """Stop training the student's stages after the last one that gets a hint or that a head reads: none learns.

    Args:
        stage: whose batches it learns from.
    """
    drawn = plan.drawn[stage].sources if distiller.learner is not None else ()
    learning = {feature for s in drawn for feature in plan.heads[s.name].MODEL.RESNETS.OUT_FEATURES}
    learning |= {name for projectors in distiller.projectors.values() for name in cast(nn.ModuleDict, projectors)}
    for name in distiller.student.stage_names:
        if name > max(learning):
            why = "gets no hint (XLEARNER.SQUEEZE.STAGES) nor does a head read it"
            logger.warning(f"{name} of the student {why}, so that it stays as it starts.")
            getattr(distiller.student, name).requires_grad_(False)
