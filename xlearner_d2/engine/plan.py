"""Everything a run needs, validated as a whole before anything is trained or written."""

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..data.balance import build_stream
from ..data.sources import SourceData, load_records, register_sources, source_data
from ..evaluation.build import check_evaluation
from ..extensions import import_modules
from ..modeling.branches import BranchSpec
from ..modeling.expanded import STAGES as RESNET_STAGES
from ..modeling.heads import COMPILED_HINT, derive_tasks, has_compiled_operators, head_config
from ..settings import SHARING, STAGES
from ..specs import ConfigError, ProbeSpec, SourceSpec, TaskSpec, one_of, parse_records, parse_sources
from .branches import check_branches, check_networks
from .drawn import Drawn, balance, check_sampling, check_weighting
from .growth import Growth, check_tasks, read_growth, with_stored_classes
from .optimizer import OPTIMIZERS
from .scaling import check_norm, check_timeouts, scale_to_workers
from .squeeze_settings import check_squeeze, check_task_weights

#: What the expand stage leaves in OUTPUT_DIR, and what squeeze starts from.
EXPANDED_FILE = "expanded.pth"
#: What the squeeze stage leaves in OUTPUT_DIR.
STUDENT_FILE = "student_d2.pth"


@dataclass(frozen=True)
class Plan:
    """A validated run.

    Attributes:
        world_size: number of workers.
        written_for: number of workers that the config was written for; it was scaled from these.
        cfg: the project's config, frozen, scaled to the number of workers.
        sources: in the order of the config.
        heads: the Detectron2 config of each source's head, by source.
        tasks: the branches.
        data: the records of each source, by source.
        probes: linear probes of the student.
        drawn: by stage; the expansion leaves frozen sources out, the squeeze those without training data.
        growth: the trained expansion that this run extends, if any.
        branches: what is special about the branches of some tasks.
    """

    world_size: int
    written_for: int
    cfg: CfgNode
    sources: tuple[SourceSpec, ...]
    heads: Mapping[str, CfgNode]
    tasks: tuple[TaskSpec, ...]
    data: Mapping[str, SourceData]
    probes: tuple[ProbeSpec, ...]
    drawn: Mapping[str, Drawn]
    growth: Growth | None
    branches: tuple[BranchSpec, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to run, in order."""
        return ("expand", "squeeze") if self.cfg.XLEARNER.STAGE == "all" else (self.cfg.XLEARNER.STAGE,)

    def stage_dir(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints and logs."""
        return Path(self.cfg.OUTPUT_DIR) / stage


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the problems of a ConfigError to a list and go on."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _check_settings(cfg: CfgNode, world_size: int) -> list[str]:
    problems = one_of("STAGE", cfg.XLEARNER.STAGE, STAGES)
    problems += check_sampling(cfg, world_size)
    if cfg.XLEARNER.COMPILE:
        problems += one_of("COMPILE", cfg.XLEARNER.COMPILE, torch.compiler.list_backends(exclude_tags=()))
    problems += one_of("SHARING", cfg.XLEARNER.SHARING, SHARING)
    for stage in cfg.XLEARNER.RECONCILIATION.STAGES:
        problems += one_of("RECONCILIATION.STAGES", stage, RESNET_STAGES)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has no usable GPU. Set it to cpu.")
    if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS and not Path(cfg.MODEL.WEIGHTS).is_file():
        problems.append(f"MODEL.WEIGHTS: there is no file {cfg.MODEL.WEIGHTS}.")
    if cfg.XLEARNER.WANDB and importlib.util.find_spec("wandb") is None:
        wish = "the package wandb is not installed: pip install wandb, or leave the setting empty"
        problems.append(f"XLEARNER.WANDB is {cfg.XLEARNER.WANDB!r}, but {wish}.")
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        problems.append(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, but one of {known} is expected.")
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not has_compiled_operators():
        problems.append(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs {COMPILED_HINT}")
    return problems + check_timeouts(cfg) + check_squeeze(cfg)


def check_output(plan: Plan, *, resume: bool) -> None:
    """See that a run would overwrite nothing and, if it squeezes alone, that it has a teacher.

    Raises:
        ConfigError: naming the folder and what to do.
    """
    problems = []
    for stage in plan.stages:
        folder = plan.stage_dir(stage)
        if not resume and folder.is_dir() and any(folder.iterdir()):
            problems.append(f"{folder} is not empty. Add --resume to continue that run, or set another OUTPUT_DIR.")
    if plan.stages == ("squeeze",):
        with _collect(problems):
            check_expanded(plan)
    if problems:
        raise ConfigError(problems, what="The output")


def check_expanded(plan: Plan) -> None:
    """See that there is an expanded model to squeeze or to evaluate.

    Raises:
        ConfigError: saying what to do.
    """
    path = expanded_file(plan.cfg)
    if not path.is_file():
        do = "run XLEARNER.STAGE expand first, or set XLEARNER.SQUEEZE.TEACHER to an expanded checkpoint"
        raise ConfigError([f"There is no expanded model {path}: {do}."], what="The output")


def expanded_file(cfg: CfgNode) -> Path:
    """The expanded checkpoint that the squeeze stage distils."""
    return Path(cfg.XLEARNER.SQUEEZE.TEACHER or os.path.join(cfg.OUTPUT_DIR, EXPANDED_FILE))


def squeeze_config(cfg: CfgNode) -> CfgNode:
    """The project's config with ``XLEARNER.SQUEEZE.SOLVER`` merged into ``SOLVER``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.merge_from_list([item for pair in cfg.XLEARNER.SQUEEZE.SOLVER.items() for item in pair])
    return cfg


def _check_head(source: SourceSpec, head: CfgNode, world_size: int) -> list[str]:
    """Problems of a head's settings with the way the source is trained and tested."""
    where, problems = f"XLEARNER.SOURCES.{source.name}", []
    options, share = head.MODEL.CLASSIFIER, source.ims_per_batch // world_size
    mixes = options.MIXUP or options.CUTMIX
    if mixes and share % 2:
        problems.append(
            f"{where}.IMS_PER_BATCH gives each worker {share} images, but mixup and cutmix need an even number."
        )
    if mixes and options.MULTI_LABEL:
        problems.append(f"{where}: MODEL.CLASSIFIER.MULTI_LABEL cannot be combined with MIXUP or CUTMIX.")
    sigmas, keypoints = head.TEST.KEYPOINT_OKS_SIGMAS, head.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if head.MODEL.KEYPOINT_ON and sigmas and len(sigmas) != keypoints:
        wish = f"one for each of the {keypoints} keypoints is expected"
        problems.append(f"{where}: TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} entries, but {wish}.")
    low, high = (*head.MODEL.DEPTH_HEAD.RANGE, 0.0, 0.0)[:2]
    if not 0 < low < high:
        got = head.MODEL.DEPTH_HEAD.RANGE
        problems.append(f"{where}: MODEL.DEPTH_HEAD.RANGE is {got}, but a nearest and a farther distance are expected.")
    return problems


def _check_training(sources: Sequence[SourceSpec], frozen: Collection[str]) -> list[str]:
    """A new source of a frozen task has its head to train; something has to be trained."""
    problems = [
        f"XLEARNER.SOURCES.{source.name}.TRAIN is empty, but its head is new: at least one data set is needed."
        for source in sources
        if not source.train and frozen and source.name not in frozen
    ]
    if sources and all(source.name in frozen for source in sources):
        problems.append("XLEARNER.FREEZE leaves nothing to train: add a source, or freeze less.")
    return problems


def _check_tests(source: SourceSpec, head: CfgNode) -> list[str]:
    """Found now, as test sets are evaluated after hours of training."""
    problems = []
    for name in source.test:
        try:
            check_evaluation(name, head)
        except ValueError as error:
            problems.append(f"XLEARNER.SOURCES.{source.name}.TEST: {error}")
    return problems


def make_plan(cfg: CfgNode, *, world_size: int) -> Plan:
    """Validate a config and its data.

    Args:
        world_size: number of workers that will train.

    Raises:
        ConfigError: with all problems of the config; when it has none, with all problems of the data.
    """
    written_for = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size
    cfg = scale_to_workers(cfg, world_size)
    import_modules(cfg.XLEARNER.IMPORTS)
    problems = _check_settings(cfg, world_size)
    problems += check_norm(cfg, "MODEL", world_size)
    branches = parse_records(BranchSpec, cfg.XLEARNER.BRANCHES, "XLEARNER.BRANCHES", problems)
    problems += check_networks(cfg, branches)
    growth = None
    with _collect(problems):
        growth = read_growth(cfg)
        cfg = with_stored_classes(cfg, growth)
    sharing = cfg.XLEARNER.SAMPLING.IMS_PER_BATCH != 0  # instead of what each source says
    sources = parse_sources(
        cfg.XLEARNER.SOURCES,
        problems,
        world_size=1 if sharing else world_size,
        frozen_tasks=cfg.XLEARNER.FREEZE,
    )
    frozen = frozenset() if growth is None else growth.frozen
    problems += _check_training(sources, frozen)
    probes = parse_records(ProbeSpec, cfg.XLEARNER.PROBES, "XLEARNER.PROBES", problems)
    with _collect(problems):
        register_sources(cfg, sources, probes)
    if problems:
        raise ConfigError(problems)
    records = load_records(sources, probes, check_images=cfg.XLEARNER.CHECK_IMAGES)
    heads, data = {}, {}
    for source in sources:
        with _collect(problems):
            heads[source.name] = head_config(source, cfg)
            data[source.name] = source_data(source, heads[source.name], records, seed=max(cfg.SEED, 0))
    if problems:
        raise ConfigError(problems)
    drawn = {
        "expand": balance(cfg, [source for source in sources if source.name not in frozen], data, world_size),
        "squeeze": balance(cfg, [source for source in sources if source.train], data, world_size),
    }
    problems += check_weighting(cfg, drawn)
    for source in {(s.name, s.ims_per_batch): s for of in drawn.values() for s in of.sources}.values():
        with _collect(problems):
            problems += _check_head(source, heads[source.name], world_size)
            problems += _check_tests(source, heads[source.name])
            build_stream(source, heads[source.name], data[source.name].train, seed=0)
            problems += check_norm(heads[source.name], f"XLEARNER.SOURCES.{source.name}: MODEL", world_size)
    if problems:
        raise ConfigError(problems)
    tasks = derive_tasks(sources, heads)
    problems += check_tasks(cfg, growth, tasks)
    problems += check_task_weights(cfg, tasks)
    problems += check_branches(cfg, branches, tasks, [] if growth is None else [task.name for task in growth.tasks])
    if problems:
        raise ConfigError(problems)
    return Plan(
        world_size=world_size,
        written_for=written_for,
        cfg=cfg,
        sources=tuple(sources),
        heads=heads,
        tasks=tuple(tasks),
        data=data,
        probes=tuple(probes),
        drawn=drawn,
        growth=growth,
        branches=tuple(branches),
    )
