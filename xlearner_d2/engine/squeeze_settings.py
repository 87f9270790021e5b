"""Settings of the squeeze, checked before anything is trained."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..modeling.distill import DISTANCES, matched_stages
from ..modeling.expanded import STAGES
from ..modeling.normalisers import NORMALISERS
from ..specs import TaskSpec, nearest, one_of


def _check_hints(squeeze: CfgNode) -> list[str]:
    """Problems of what gives hints to which stage, and of their weights."""
    problems, count = [], len(squeeze.STAGES)
    for key in ("STAGES", "TEACHER_STAGES"):
        for stage in squeeze[key]:
            problems += one_of(f"SQUEEZE.{key}", stage, STAGES)
    for key in ("TEACHER_STAGES", "STAGE_WEIGHTS"):
        found = len(squeeze[key])
        if found != count:
            problems.append(f"XLEARNER.SQUEEZE.{key} has {found} entries, but SQUEEZE.STAGES has {count}.")
    problems += [
        f"XLEARNER.SQUEEZE.STAGES names {stage} more than once, but a stage learns from one of the branches' stages."
        for stage, often in Counter(squeeze.STAGES).items()
        if often > 1
    ]
    weights = list(squeeze.STAGE_WEIGHTS)
    if not all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights):
        wish = "finite numbers of at least 0 are expected"
        problems.append(f"XLEARNER.SQUEEZE.STAGE_WEIGHTS is {weights}, but {wish}.")
    elif not any(weights) and not squeeze.TASK_LOSSES:
        text = f"XLEARNER.SQUEEZE.STAGE_WEIGHTS is {weights}, so the student learns nothing unless TASK_LOSSES is True."
        problems.append(text)
    for stage, giver in zip(squeeze.STAGES, squeeze.TEACHER_STAGES, strict=False):
        if giver > stage and {giver, stage} <= {*STAGES}:
            wish = "the same stage or a shallower one is expected"
            problems.append(f"XLEARNER.SQUEEZE.TEACHER_STAGES has {giver} for {stage} of the student, but {wish}.")
    return problems


def check_squeeze(cfg: CfgNode) -> list[str]:
    """Problems of ``XLEARNER.SQUEEZE`` that show without data."""
    squeeze = cfg.XLEARNER.SQUEEZE
    problems = one_of("SQUEEZE.DISTANCE", squeeze.DISTANCE, DISTANCES)
    problems += one_of("SQUEEZE.NORMALISER", squeeze.NORMALISER, NORMALISERS)
    problems += _check_hints(squeeze)
    if squeeze.ONLINE and cfg.XLEARNER.STAGE == "squeeze":
        wish = "which is not run: set XLEARNER.STAGE to expand, or ONLINE to False"
        problems.append(f"XLEARNER.SQUEEZE.ONLINE squeezes in the steps of the expansion, {wish}.")
    if squeeze.ONLINE and squeeze.TEACHER:
        wish = "but ONLINE squeezes the branches of this run: leave out one of the two"
        problems.append(f"XLEARNER.SQUEEZE.TEACHER is {squeeze.TEACHER!r}, {wish}.")
    if squeeze.PROJECTOR_LAYERS < 1:
        problems.append(f"XLEARNER.SQUEEZE.PROJECTOR_LAYERS is {squeeze.PROJECTOR_LAYERS}, but at least 1 is expected.")
    if not 0 <= squeeze.HINT_WEIGHT < float("inf"):
        wish = "a finite number of at least 0 is expected"
        problems.append(f"XLEARNER.SQUEEZE.HINT_WEIGHT is {squeeze.HINT_WEIGHT}, but {wish}.")
    if squeeze.HINT_WEIGHT == 0 and not squeeze.TASK_LOSSES:
        problems.append("XLEARNER.SQUEEZE.HINT_WEIGHT is 0, so the student learns nothing unless TASK_LOSSES is True.")
    for task, weight in squeeze.TASK_WEIGHTS.items():
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            wish = "a finite number of at least 0 is expected"
            problems.append(f"XLEARNER.SQUEEZE.TASK_WEIGHTS.{task} is {weight!r}, but {wish}.")
    if not 0 <= squeeze.EMA_DECAY < 1:
        problems.append(f"XLEARNER.SQUEEZE.EMA_DECAY is {squeeze.EMA_DECAY}, but 0 to below 1 is expected.")
    if squeeze.EMA_DECAY and not squeeze.BN_RECALIBRATION_BATCHES:
        wish = "averaged weights need statistics of their own: set XLEARNER.SQUEEZE.BN_RECALIBRATION_BATCHES above 0"
        problems.append(f"XLEARNER.SQUEEZE.EMA_DECAY is {squeeze.EMA_DECAY}, but {wish}.")
    for key in squeeze.SOLVER:
        if key not in cfg.SOLVER:
            problems.append(f"XLEARNER.SQUEEZE.SOLVER has the unknown key {key!r}.{nearest(key, cfg.SOLVER)}")
    if squeeze.TEACHER and not Path(squeeze.TEACHER).is_file():
        problems.append(f"XLEARNER.SQUEEZE.TEACHER: there is no file {squeeze.TEACHER}.")
    return problems


def squeeze_config(cfg: CfgNode) -> CfgNode:
    """The project's config with ``XLEARNER.SQUEEZE.SOLVER`` merged into ``SOLVER``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.merge_from_other_cfg(cfg.XLEARNER.SQUEEZE.SOLVER)
    return cfg


def squeeze_batches(cfg: CfgNode) -> str:
    """The stage whose batches the student learns from."""
    return "expand" if cfg.XLEARNER.SQUEEZE.ONLINE else "squeeze"


def hint_factors(cfg: CfgNode, tasks: Iterable[str], drawn: Collection[str]) -> dict[str, float]:
    """By task, the factor on the hints of its branch; 0 where ``OWN_IMAGES`` leaves no image to ask for them.

    Args:
        drawn: tasks of the sources that the student's batches are drawn from.
    """
    squeeze = cfg.XLEARNER.SQUEEZE
    asked = {task: not squeeze.OWN_IMAGES or task in drawn for task in tasks}
    return {task: squeeze.TASK_WEIGHTS.get(task, 1.0) if of else 0.0 for task, of in asked.items()}


def check_task_weights(cfg: CfgNode, tasks: Sequence[TaskSpec], drawn: Collection[str]) -> list[str]:
    """Problems of ``XLEARNER.SQUEEZE.TASK_WEIGHTS`` with the tasks that there are.

    Args:
        drawn: as for :func:`hint_factors`.
    """
    squeeze, known = cfg.XLEARNER.SQUEEZE, [task.name for task in tasks]
    problems = [
        f"XLEARNER.SQUEEZE.TASK_WEIGHTS names the unknown task {name!r}.{nearest(name, known)}"
        for name in squeeze.TASK_WEIGHTS
        if name not in known
    ]
    factors = hint_factors(cfg, known, drawn)
    if not squeeze.TASK_LOSSES and not any(factors.values()):
        which = "all tasks that have images to train on (OWN_IMAGES)" if squeeze.OWN_IMAGES else "all tasks"
        problems.append(
            f"XLEARNER.SQUEEZE.TASK_WEIGHTS are 0 for {which}, so the student learns nothing "
            "unless TASK_LOSSES is True."
        )
    elif squeeze.OWN_IMAGES and not squeeze.TASK_LOSSES and cfg.XLEARNER.STEPS == "alternating":
        # A step has images of one source, from which the student learns by the hints of that task alone.
        first = min(matched_stages(squeeze.TEACHER_STAGES, squeeze.STAGE_WEIGHTS))
        reads = {task.name: max(task.out_features) for task in tasks}  # a branch has all stages up to this one
        deepest = dict.fromkeys(reads, max(reads.values())) if cfg.XLEARNER.SHARING == "shared" else reads
        silent = [task for task, stage in deepest.items() if not factors[task] or stage < first]
        problems += [
            f"XLEARNER.SQUEEZE.OWN_IMAGES: nothing is learned from the steps of task {task!r}, whose branch gives no "
            "hint. Set TASK_LOSSES, leave OWN_IMAGES out, or set XLEARNER.STEPS joint."
            for task in silent
            if task in drawn
        ]
    return problems
