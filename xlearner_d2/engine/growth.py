"""Growth of a trained expansion by sources and tasks: what its file says, whether the config fits, what is frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..checkpoint.grow import belongs_to, load_grown, part_of, summary, unread
from ..checkpoint.load import is_counter, read_checkpoint
from ..checkpoint.stored import PIXEL_KEYS, differing_settings, stored_config
from ..modeling import XLearner
from ..modeling.branches import ARCHITECTURE_KEYS, BranchSpec, branch_config, network_name
from ..modeling.expanded import STAGES, TRUNK
from ..specs import ConfigError, SourceSpec, TaskSpec, nearest
from .branches import start_branch, start_of
from .class_names import ClassNames, check_class_names, stored_class_names


@dataclass(frozen=True)
class Growth:
    """A trained expansion that this run extends.

    Attributes:
        path: ``XLEARNER.EXTEND``.
        tasks: its branches.
        task_of: the task of each of its sources.
        classes: by source, settings of its head that hold the numbers of classes, as keys and values.
        class_names: of its sources; empty for files of before these were kept.
        frozen: its sources whose task is in ``XLEARNER.FREEZE``; they are not trained.
    """

    path: str
    tasks: tuple[TaskSpec, ...]
    task_of: Mapping[str, str]
    classes: Mapping[str, Sequence[Any]]
    class_names: ClassNames
    frozen: frozenset[str]


def read_growth(cfg: CfgNode) -> Growth | None:
    """What ``XLEARNER.EXTEND`` names, if anything, compared with the config.

    Raises:
        ConfigError: with everything that would change what the file's model computes.
    """
    path, freeze = cfg.XLEARNER.EXTEND, cfg.XLEARNER.FREEZE
    if not isinstance(freeze, list | tuple):
        raise ConfigError([f"XLEARNER.FREEZE is {freeze!r}, but a list of tasks such as [detection] is expected."])
    if not path:
        _check_nothing_grows(cfg)
        return None
    if cfg.MODEL.WEIGHTS:
        wish = "new branches start from XLEARNER.EXTEND_INIT"
        raise ConfigError([f"MODEL.WEIGHTS and XLEARNER.EXTEND cannot both be set: {wish}."])
    checkpoint = read_checkpoint(path)
    description = checkpoint.get("xlearner", {})
    if "tasks" not in description:
        message = f"{path} is no expanded checkpoint; one is called expanded.pth in the output of expand."
        raise ConfigError([f"XLEARNER.EXTEND: {message}"])
    stored = stored_config(checkpoint)
    tasks = tuple(_task(record) for record in description["tasks"])
    task_of = {source: task.name for task in tasks for source in task.sources}
    problems = _settings_problems(cfg, stored, path) + _source_problems(cfg, task_of, path)
    names = [task.name for task in tasks]
    for task in freeze:
        if task not in names:
            problems.append(f"XLEARNER.FREEZE names {task!r}, which is no task of {path}.{nearest(task, names)}")
        elif _is_dropped(cfg, task, task_of):
            wish = "leave it out of FREEZE, or keep one of them"
            problems.append(f"XLEARNER.FREEZE names {task!r}, all of whose sources are dropped: {wish}.")
    if freeze and cfg.XLEARNER.SHARING == "shared":
        problems.append("XLEARNER.FREEZE freezes branches, but with XLEARNER.SHARING 'shared' there is one trunk.")
    if problems:
        raise ConfigError(problems)
    frozen = frozenset(source for source, task in task_of.items() if task in freeze)
    return Growth(
        path=path,
        tasks=tasks,
        task_of=task_of,
        classes=description.get("classes", {}),
        class_names=stored_class_names(checkpoint),
        frozen=frozen & _given(cfg),
    )


def _task(record: Mapping[str, Any]) -> TaskSpec:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return TaskSpec(**values)


def _check_nothing_grows(cfg: CfgNode) -> None:
    for key in ("FREEZE", "EXTEND_INIT"):
        if cfg.XLEARNER[key]:
            raise ConfigError([f"XLEARNER.{key} is {cfg.XLEARNER[key]!r}, but XLEARNER.EXTEND names no trained model."])


def _given(cfg: CfgNode) -> set[str]:
    return {name for name, record in cfg.XLEARNER.SOURCES.items() if record is not None}


def _settings_problems(cfg: CfgNode, stored: Mapping[str, Any], path: str) -> list[str]:
    """Settings that decide what the file's branches compute, where the config differs."""
    keys = [f"MODEL.RESNETS.{key}" for key in ARCHITECTURE_KEYS]
    keys += [*PIXEL_KEYS, "XLEARNER.RECONCILIATION.STAGES", "XLEARNER.RECONCILIATION.CROSS_SCALE"]
    problems = differing_settings(cfg, stored, keys, f"XLEARNER.EXTEND {path}")
    problems += _network_problems(cfg, stored, path)
    here, there = cfg.XLEARNER.SHARING, stored["XLEARNER"]["SHARING"]
    exchanging = ("detached", "bidirectional")
    fits = here == there or (here in exchanging and there in (*exchanging, "separate"))
    if not fits:
        problems.append(f"XLEARNER.SHARING is {here!r}, which cannot continue XLEARNER.EXTEND {path} with {there!r}.")
    return problems


def _network_problems(cfg: CfgNode, stored: Mapping[str, Any], path: str) -> list[str]:
    """Networks of the file's branches that the config has otherwise; files of before know only MODEL.RESNETS."""
    there = cfg.clone()
    there.defrost()
    there.MODEL.BACKBONE.TIMM = stored["MODEL"]["BACKBONE"].get("TIMM", "")
    there.XLEARNER.BRANCHES = CfgNode(stored["XLEARNER"].get("BRANCHES", {}))
    problems = []
    for task in dict.fromkeys(record["TASK"] for record in stored["XLEARNER"]["SOURCES"].values() if record):
        own, old = (network_name(branch_config(of, task)) for of in (cfg, there))
        if own != old:
            wish = f"set XLEARNER.BRANCHES.{task} as there"
            problems.append(f"The branch of task {task!r} is {own}, but {old} in XLEARNER.EXTEND {path}: {wish}.")
    return problems


def _is_dropped(cfg: CfgNode, task: str, task_of: Mapping[str, str]) -> bool:
    """Whether the config drops all sources that a task has in the file, and adds none."""
    records = cfg.XLEARNER.SOURCES
    kept = [source for source, of in task_of.items() if of == task and records.get(source, "") is not None]
    return not kept and not any(isinstance(it, CfgNode) and it.get("TASK") == task for it in records.values())


def _source_problems(cfg: CfgNode, task_of: Mapping[str, str], path: str) -> list[str]:
    """Sources of the file that the config does not mention, or gives to another task."""
    problems, records = [], cfg.XLEARNER.SOURCES
    for source, task in task_of.items():
        if source not in records:
            wish = f"describe it in XLEARNER.SOURCES, or drop it with XLEARNER.SOURCES.{source}: null"
            problems.append(f"XLEARNER.EXTEND {path} has the source {source!r}, which the config has not: {wish}.")
        elif isinstance(records[source], CfgNode) and records[source].get("TASK") != task:
            there = f"but {task!r} in XLEARNER.EXTEND {path}: choose another name for a new source"
            problems.append(f"XLEARNER.SOURCES.{source}.TASK is {records[source].get('TASK')!r}, {there}.")
    return problems


def with_stored_classes(cfg: CfgNode, growth: Growth | None) -> CfgNode:
    """The config, with the class counts of frozen sources that have no data set to read them from.

    Raises:
        ConfigError: when the file does not have them either.
    """
    if growth is None:
        return cfg
    cfg, problems = cfg.clone(), []
    cfg.defrost()
    for source in sorted(growth.frozen):
        record = cfg.XLEARNER.SOURCES[source]
        if record.get("TRAIN") or record.get("TEST"):
            continue
        if source not in growth.classes:
            wish = "name the data set that has its classes in TRAIN or TEST"
            problems.append(f"XLEARNER.SOURCES.{source}: {growth.path} does not have its classes; {wish}.")
        else:
            record.OPTS = [*growth.classes[source], *record.get("OPTS", ())]
    if problems:
        raise ConfigError(problems)
    cfg.freeze()
    return cfg


def check_growth(
    cfg: CfgNode, growth: Growth | None, sources: Sequence[SourceSpec], tasks: Sequence[TaskSpec]
) -> list[str]:
    """Problems of the sources, whose data has been loaded, and of the new tasks with those of the file."""
    if growth is None:
        return []
    old = {task.name: task for task in growth.tasks}
    problems = check_class_names(sources, growth.class_names, f"XLEARNER.EXTEND {growth.path}")
    for task in tasks:
        if task.name not in old:
            continue
        if task.res5_dilation != old[task.name].res5_dilation:
            strides = f"{32 // task.res5_dilation}, but {32 // old[task.name].res5_dilation}"
            problems.append(f"The heads of task {task.name!r} want stride {strides} in XLEARNER.EXTEND {growth.path}.")
        deeper = sorted(set(task.out_features) - set(_stages(old[task.name])))
        if task.name in cfg.XLEARNER.FREEZE and deeper:
            lack = f"its heads read {', '.join(deeper)}, which that branch has not"
            problems.append(f"XLEARNER.FREEZE names {task.name!r}, but {lack} in {growth.path}.")
    start, known = cfg.XLEARNER.EXTEND_INIT, [task.name for task in growth.tasks]
    if not (start in ("", "random", *known) or "://" in start or Path(start).is_file()):
        hint = nearest(start, [*known, "random"])
        problems.append(f"XLEARNER.EXTEND_INIT is {start!r}, no task of {growth.path} and no file.{hint}")
    return problems


def _stages(task: TaskSpec) -> tuple[str, ...]:
    return tuple(stage for stage in STAGES if stage <= max(task.out_features))


def grow(model: XLearner, cfg: CfgNode, growth: Growth, branches: Sequence[BranchSpec]) -> str:
    """Load the file's parts into ``model``, start its new branches, and freeze what is to stay.

    Args:
        branches: may say what a new branch starts from.

    Returns:
        what was done, in sentences.

    Raises:
        ConfigError: when a part of the file does not fit; see :func:`.grow.load_grown`.
    """
    state = read_checkpoint(growth.path)["model"]
    kept = _given(cfg) & set(growth.task_of)
    lost_tasks = {task.name for task in growth.tasks} - set(model.backbone.tasks)
    lost = {"branches": lost_tasks, "heads": set(growth.task_of) - kept}
    dropped = [name for name in state if belongs_to(name, **lost)]
    # Where a source is dropped that reads deeper than those that stay, its branch ends earlier than that of the file.
    losing = {growth.task_of[source] for source in lost["heads"]} - lost_tasks
    shorter = {model.backbone.branch_of[task] for task in losing} | ({TRUNK} if lost["heads"] else set())
    ends = unread(state, model, shorter)
    report = load_grown(model, state, path=growth.path, dropped=[*dropped, *ends])
    sentences = [f"{report}.", *_start_new_branches(model, cfg, growth, state, branches)]
    if ends:
        names = summary(dict.fromkeys(map(part_of, ends)))
        sentences.append(f"Left out, as no head reads it any more: {names}.")
    if lost_tasks:
        names = ", ".join(sorted(lost_tasks))
        sentences.append(
            f"Without {names}, the other branches compute other features, as they receive nothing from there."
        )
    for task in cfg.XLEARNER.FREEZE:
        incoming = model.backbone.incoming(model.backbone.branch_of[task])
        learning = [] if incoming is None else [name for name in incoming.heard() if name not in cfg.XLEARNER.FREEZE]
        if learning:
            sentences.append(
                f"The outputs of {task} will change all the same, as it receives features from {', '.join(learning)}: "
                "name in XLEARNER.FREEZE what learns on there, too, if they are to stay."
            )
    model.freeze_parts(tasks=cfg.XLEARNER.FREEZE, heads=sorted(growth.frozen))
    return " ".join(sentences)


def _start_new_branches(
    model: XLearner, cfg: CfgNode, growth: Growth, state: Mapping[str, Tensor], branches: Sequence[BranchSpec]
) -> list[str]:
    """Say how each branch that the file lacks starts."""
    sentences = []
    old = {TRUNK, *(task.name for task in growth.tasks)}
    for name, branch in model.backbone.branches.items():
        start = start_of(cfg, branches, name)[1] or growth.tasks[0].name
        if name in old or start == "random":
            continue
        prefix = f"backbone.branches.{start}."
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found and not _fits(branch, found):
            sentences.append(f"Branch {name} starts at random, as branch {start} is another network.")
        elif found:  # stages that only the new branch has stay random
            branch.load_state_dict({key: found[key] for key in branch.state_dict() if key in found}, strict=False)
            sentences.append(f"Branch {name} starts as branch {start}.")
        else:
            sentences.append(f"Branch {name} starts from {start}: {start_branch(model, name, start, cfg, heads=True)}.")
    return sentences


def _fits(branch: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the stages that both have are built alike."""
    own = branch.state_dict()
    stages = {name.split(".")[0] for name in own} & {name.split(".")[0] for name in state}
    first, second = (
        {n: v.shape for n, v in of.items() if n.split(".")[0] in stages and not is_counter(n)} for of in (own, state)
    )
    return first == second
