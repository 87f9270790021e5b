"""Everything a run needs, validated as a whole before anything is trained or written."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint.load import read_checkpoint
from ..checkpoint.stored import check_convention
from ..data.balance import build_stream
from ..data.sources import SourceData, load_records, register_sources, source_data
from ..extensions import import_modules
from ..modeling.branches import BranchSpec
from ..modeling.heads import derive_tasks, head_config
from ..specs import ConfigError, ProbeSpec, SourceSpec, TaskSpec, parse_records, parse_sources
from .branches import check_branches, check_networks, learner_config, squeezes
from .class_names import check_class_names, stored_class_names
from .drawn import Drawn, balance, check_weighting
from .growth import Growth, check_growth, read_growth, with_stored_classes
from .plan_checks import (
    check_head,
    check_settings,
    check_tests,
    check_training,
    tell_few_images,
    tell_long_warm_up,
    tell_unread,
)
from .resumed import (
    changed_settings,
    check_expansion_unchanged,
    check_squeeze_unchanged,
    check_start_unchanged,
    check_unchanged,
)
from .scaling import check_norm, scale_to_workers
from .squeeze_settings import check_task_weights, hint_factors, squeeze_batches
from .trunk_settings import starts_from_trunk

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

    @property
    def trunk_steps(self) -> int:
        """Steps of the trunk that is trained first, if any."""
        return int(self.cfg.XLEARNER.TRUNK_STEPS) if starts_from_trunk(self.cfg) else 0

    def stage_dir(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints and logs; that of the trunk is the output of a whole run."""
        return Path(self.cfg.OUTPUT_DIR) / stage


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the problems of a ConfigError to a list and go on."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _stop_at(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(problems)


def check_output(plan: Plan, *, resume: bool) -> None:
    """See that a run would overwrite nothing and, if it does not train its teacher any more, that it has one.

    Raises:
        ConfigError: naming the folder and what to do.
    """
    problems = check_unchanged(plan.cfg) if resume else []
    trunk = ["trunk"] if plan.trunk_steps else []
    for stage in (*trunk, *plan.stages):
        folder = plan.stage_dir(stage)
        if not resume and folder.is_dir() and any(folder.iterdir()):
            problems.append(f"{folder} is not empty. Add --resume to continue that run, or set another OUTPUT_DIR.")
    if resume and "squeeze" in plan.stages and plan.stage_dir("squeeze").is_dir():
        problems += _other_teacher(plan.cfg)
    squeeze = plan.cfg.XLEARNER.SQUEEZE
    if resume and plan.stage_dir(squeeze_batches(plan.cfg)).is_dir():
        problems += check_squeeze_unchanged(plan.cfg)
    given = "squeeze" in plan.stages and squeeze.TEACHER
    trained = resume and expanded_file(plan.cfg).is_file()
    too_late = squeeze.ONLINE and not (Path(plan.cfg.OUTPUT_DIR) / STUDENT_FILE).is_file()
    if resume and plan.stage_dir("expand").is_dir():
        problems += check_start_unchanged(plan.cfg)
        problems += check_expansion_unchanged(plan.cfg) if too_late or not trained else []
    if plan.stages == ("squeeze",) or given or trained:
        with _collect(problems):
            check_expanded(plan)
    if problems:
        raise ConfigError(problems, what="The output")


def _other_teacher(cfg: CfgNode) -> list[str]:
    """A student that another teacher has begun, or has finished, is not to be taken for that of this one."""
    before, now = changed_settings(cfg).get("XLEARNER.SQUEEZE.TEACHER", ("", ""))
    files = [Path(of or os.path.join(cfg.OUTPUT_DIR, EXPANDED_FILE)).resolve() for of in (before, now)]
    if files[0] == files[1]:
        return []
    wish = "set it so, or another OUTPUT_DIR"
    return [f"XLEARNER.SQUEEZE.TEACHER is {now!r}, but the squeeze in {cfg.OUTPUT_DIR} has {before!r}: {wish}."]


def check_expanded(plan: Plan) -> None:
    """See that there is an expanded model to squeeze or to evaluate, which the config would use as it was trained.

    Raises:
        ConfigError: saying what to do, or which settings differ.
    """
    path = expanded_file(plan.cfg)
    if not path.is_file():
        do = "run XLEARNER.STAGE expand first, or set XLEARNER.SQUEEZE.TEACHER to an expanded checkpoint"
        raise ConfigError([f"There is no expanded model {path}: {do}."], what="The output")
    checkpoint = read_checkpoint(path)
    check_convention(plan.cfg, checkpoint, path)
    what = f"the expanded model {path}"
    _stop_at(
        _other_tasks(plan, checkpoint, what) or check_class_names(plan.sources, stored_class_names(checkpoint), what)
    )


def _other_tasks(plan: Plan, checkpoint: Mapping[str, Any], what: str) -> list[str]:
    """Found now, as a teacher from elsewhere is loaded after hours of expansion."""
    stored = checkpoint.get("xlearner", {}).get("tasks", ())
    here = {task.name: sorted(task.sources) for task in plan.tasks}
    there = {task["name"]: sorted(task["sources"]) for task in stored} or here
    own, other = (
        ", ".join(f"{name} ({', '.join(sources)})" for name, sources in sorted(of.items())) for of in (here, there)
    )
    if here != there:
        return [f"The tasks, and their sources, are {own}, but {what} has {other}."]
    dilations = {task["name"]: task["res5_dilation"] for task in stored}
    return [
        f"The heads of task {task.name!r} want stride {32 // task.res5_dilation} of res5, but in {what} it has "
        f"{32 // dilations[task.name]}: set MODEL.RESNETS.RES5_DILATION in the OPTS of its sources as there."
        for task in plan.tasks
        if dilations.get(task.name, task.res5_dilation) != task.res5_dilation
    ]


def expanded_file(cfg: CfgNode) -> Path:
    """The expanded checkpoint that the squeeze stage distils."""
    return Path(cfg.XLEARNER.SQUEEZE.TEACHER or os.path.join(cfg.OUTPUT_DIR, EXPANDED_FILE))


def make_plan(cfg: CfgNode, *, world_size: int) -> Plan:
    """Validate a config and its data.

    Args:
        world_size: number of workers that will train.

    Raises:
        ConfigError: with all problems of the config; when it has none, with all problems of the data.
    """
    written_for = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size
    asked = _read_settings(scale_to_workers(cfg, world_size), world_size)
    heads, data = _read_data(asked)
    drawn = {
        "expand": balance(asked.cfg, [s for s in asked.sources if s.name not in asked.frozen], data, world_size),
        "squeeze": balance(asked.cfg, [s for s in asked.sources if s.train], data, world_size),
    }
    _check_drawn(asked, drawn, heads, data, world_size)
    tell_few_images(asked.cfg, drawn["expand"].sources, world_size)
    tasks = _derive_tasks(asked, heads, {s.task for s in drawn[squeeze_batches(asked.cfg)].sources})
    _check_student_heads(asked, tasks)
    return Plan(
        world_size=world_size,
        written_for=written_for,
        cfg=asked.cfg,
        sources=asked.sources,
        heads=heads,
        tasks=tasks,
        data=data,
        probes=asked.probes,
        drawn=drawn,
        growth=asked.growth,
        branches=asked.branches,
    )


@dataclass(frozen=True)
class _Settings:
    """What a config asks for, before any data is read; the attributes are those of :class:`Plan`."""

    cfg: CfgNode
    sources: tuple[SourceSpec, ...]
    probes: tuple[ProbeSpec, ...]
    growth: Growth | None
    branches: tuple[BranchSpec, ...]

    @property
    def frozen(self) -> frozenset[str]:
        """Sources whose branch and head stay as they are."""
        return frozenset() if self.growth is None else self.growth.frozen


def _read_settings(cfg: CfgNode, world_size: int) -> _Settings:
    import_modules(cfg.XLEARNER.IMPORTS)
    problems = check_settings(cfg, world_size)
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
    probes = parse_records(ProbeSpec, cfg.XLEARNER.PROBES, "XLEARNER.PROBES", problems)
    asked = _Settings(cfg=cfg, sources=tuple(sources), probes=tuple(probes), growth=growth, branches=tuple(branches))
    problems += check_training(sources, asked.frozen)
    tell_unread(cfg)
    with _collect(problems):
        register_sources(cfg, sources, probes)
    _stop_at(problems)
    tell_long_warm_up(cfg)
    return asked


def _read_data(asked: _Settings) -> tuple[dict[str, CfgNode], dict[str, SourceData]]:
    """The config of each source's head, and its records."""
    cfg = asked.cfg
    problems: list[str] = []
    records = load_records(asked.sources, asked.probes, check_images=cfg.XLEARNER.CHECK_IMAGES)
    heads, data = {}, {}
    for source in asked.sources:
        with _collect(problems):
            heads[source.name] = head_config(source, cfg)
            data[source.name] = source_data(source, heads[source.name], records, seed=max(cfg.SEED, 0))
    _stop_at(problems)
    return heads, data


def _check_drawn(
    asked: _Settings,
    drawn: Mapping[str, Drawn],
    heads: Mapping[str, CfgNode],
    data: Mapping[str, SourceData],
    world_size: int,
) -> None:
    """See that each source can be trained with the images that a step has of it, and that all can be tested."""
    problems = check_weighting(asked.cfg, drawn)
    for source in asked.sources:
        problems += check_tests(source, heads[source.name])
    for source in {(s.name, s.ims_per_batch): s for of in drawn.values() for s in of.sources}.values():
        with _collect(problems):
            problems += check_head(source, heads[source.name], world_size)
            build_stream(source, heads[source.name], data[source.name].train, seed=0)
            problems += check_norm(heads[source.name], f"XLEARNER.SOURCES.{source.name}: MODEL", world_size)
    _stop_at(problems)


def _derive_tasks(asked: _Settings, heads: Mapping[str, CfgNode], drawn: Collection[str]) -> tuple[TaskSpec, ...]:
    """The branches, which fit what the squeeze, BRANCHES and the trained expansion say about them.

    Args:
        drawn: tasks of the sources that the student's batches are drawn from.
    """
    tasks = derive_tasks(asked.sources, heads)
    trained = [] if asked.growth is None else [task.name for task in asked.growth.tasks]
    problems = check_growth(asked.cfg, asked.growth, asked.sources, tasks)
    problems += check_task_weights(asked.cfg, tasks, drawn)
    factors = hint_factors(asked.cfg, [task.name for task in tasks], drawn)
    hinting = [task for task, factor in factors.items() if factor * asked.cfg.XLEARNER.SQUEEZE.HINT_WEIGHT]
    problems += check_branches(asked.cfg, asked.branches, tasks, old=trained, hinting=hinting)
    _stop_at(problems)
    return tuple(tasks)


def _check_student_heads(asked: _Settings, tasks: Sequence[TaskSpec]) -> None:
    """Found now, as the student's heads are built after hours of expansion: they stand on its network, not a branch."""
    if not (squeezes(asked.cfg) and asked.cfg.XLEARNER.SQUEEZE.TASK_LOSSES):
        return
    cfg = learner_config(asked.cfg, tasks)
    problems: list[str] = []
    for source in asked.sources:
        with _collect(problems):
            head_config(source, cfg)
    _stop_at([f"The student's head: {problem}" for problem in problems])
