"""The networks of branches and student: whether they can be built and fit their files, and what they start from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import Tensor

from ..checkpoint.load import (
    LoadReport,
    check_resnet,
    is_counter,
    load_res5,
    load_resnet,
    load_strictly,
    read_checkpoint,
    with_own_counters,
)
from ..checkpoint.pixels import PixelConvention
from ..checkpoint.stored import CONVENTION_KEYS, check_convention, differing_settings, stored_config
from ..modeling import XLearner
from ..modeling.branches import DEPTHS, Branch, BranchSpec, branch_config, build_branch, network_name, with_network
from ..modeling.expanded import STAGES, TRUNK, build_expanded_backbone
from ..modeling.timm_backbone import timm_problem
from ..specs import ConfigError, TaskSpec, nearest
from .trunk_settings import starts_from_trunk

logger = logging.getLogger(__name__)

#: A start that is no file.
RANDOM = "random"
#: Of photographs' pixels from 0 to 255, roughly.
_PIXEL_DEVIATION = 58.0


def student_config(cfg: CfgNode, tasks: Sequence[TaskSpec]) -> CfgNode:
    """The project's config with the student's network in ``MODEL``, whatever the branches of these tasks are.

    The student learns as a whole, whatever ``FREEZE_AT`` keeps of the branches: a stage kept from one of them could
    follow no other, and of a student that starts at random it would stay random.
    """
    squeeze = cfg.XLEARNER.SQUEEZE
    cfg = with_network(cfg, timm=squeeze.TIMM, depth=squeeze.DEPTH)
    cfg.XLEARNER.BRANCHES = CfgNode(new_allowed=True)
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.RESNETS.RES5_DILATION = max(task.res5_dilation for task in tasks)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


def learner_config(cfg: CfgNode, tasks: Sequence[TaskSpec]) -> CfgNode:
    """The project's config with a head for each source on the student, as one trunk."""
    cfg = student_config(cfg, tasks)
    cfg.XLEARNER.SHARING = "shared"
    return cfg


def check_networks(cfg: CfgNode, specs: Sequence[BranchSpec]) -> list[str]:
    """Problems of the settings that say what branches and student are."""
    squeeze = cfg.XLEARNER.SQUEEZE
    problems = _network_problems("MODEL.BACKBONE", cfg.MODEL.BACKBONE.TIMM, 0)
    problems += _depth_problems("MODEL.RESNETS", cfg.MODEL.RESNETS.DEPTH, DEPTHS)
    problems += _network_problems("XLEARNER.SQUEEZE", squeeze.TIMM, squeeze.DEPTH)
    for spec in specs:
        where = f"XLEARNER.BRANCHES.{spec.name}"
        problems += _network_problems(where, spec.timm, spec.depth)
        if not _is_start(spec.weights):
            problems.append(f"{where}.WEIGHTS is {spec.weights!r}, but a file or {RANDOM!r} is expected.")
    if specs and cfg.XLEARNER.SHARING == "shared":
        problems.append(
            "XLEARNER.BRANCHES says what branches are, but with XLEARNER.SHARING 'shared' there is one trunk."
        )
    return problems


def _depth_problems(where: str, depth: int, known: Sequence[int]) -> list[str]:
    names = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
    return [] if depth in known else [f"{where}.DEPTH is {depth}, but {names} is expected."]


def _network_problems(where: str, timm: str, depth: int) -> list[str]:
    problems = _depth_problems(where, depth, (0, *DEPTHS))
    if timm and depth:
        problems.append(f"{where} has TIMM {timm!r} and DEPTH {depth}, but one of them is expected.")
    problem = timm_problem(timm) if timm else ""
    return [*problems, *([f"{where}.TIMM is {timm!r}: {problem}"] if problem else [])]


def _is_start(weights: str) -> bool:
    return weights in ("", RANDOM) or "://" in weights or Path(weights).is_file()


def check_branches(
    cfg: CfgNode, specs: Sequence[BranchSpec], tasks: Sequence[TaskSpec], *, old: Sequence[str], hinting: Sequence[str]
) -> list[str]:
    """Problems of networks with their tasks and with the files that they start from; nothing is built in memory.

    Args:
        old: tasks that ``XLEARNER.EXTEND`` has.
        hinting: tasks whose branches the student is to learn from.
    """
    names = [task.name for task in tasks]
    problems = []
    for spec in specs:
        if spec.name not in names:
            problems.append(f"XLEARNER.BRANCHES names {spec.name!r}, which is no task.{nearest(spec.name, names)}")
        elif spec.name in old and spec.weights:
            wish = "starts as XLEARNER.EXTEND has it"
            problems.append(f"XLEARNER.BRANCHES.{spec.name}.WEIGHTS is {spec.weights!r}, but that branch {wish}.")
        elif starts_from_trunk(cfg) and (own := network_name(branch_config(cfg, spec.name))) != network_name(cfg):
            wish = f"but with XLEARNER.TRUNK_STEPS all branches start as one trunk, {network_name(cfg)}"
            problems.append(f"XLEARNER.BRANCHES.{spec.name} is {own}, {wish}.")
    found = [*_unbuildable(cfg, tasks)]
    if problems or found:
        return problems + found
    with torch.device("meta"):
        branches = dict(build_expanded_backbone(cfg, tasks).branches.items())
    starts = {name: start_of(cfg, specs, name) for name in branches if name not in old}
    for name, (setting, path) in starts.items():
        problems += _misfit(branches[name], setting, path)
    if starts_from_trunk(cfg):
        problems += _misfit(next(iter(branches.values())), "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    problems += _lack_of_trunk(cfg)
    givers = {task: branches[TRUNK if TRUNK in branches else task] for task in hinting}
    return [*dict.fromkeys(problems), *_check_student(cfg, tasks, branches, givers)]


def _unbuildable(cfg: CfgNode, tasks: Sequence[TaskSpec]) -> Iterator[str]:
    """Why a network cannot be built, tried without memory: Detectron2 and torch refuse with assertions of their own."""
    own = [] if cfg.XLEARNER.SHARING == "shared" else tasks
    networks = {
        f"The branch of task {task.name!r}": (branch_config(cfg, task.name), task.res5_dilation) for task in own
    }
    networks["The student"] = (student_config(cfg, tasks), 0)
    failed = False
    for what, (config, dilation) in networks.items():
        try:
            _on_meta(config, dilation)
        except ConfigError as error:
            failed = True
            yield from (f"{what}: {problem}" for problem in error.problems)
        except (AssertionError, ValueError) as error:
            failed = True
            yield f"{what}, {network_name(config)}, cannot be built: {error or repr(error)}. See MODEL.RESNETS."
    if failed:
        return
    try:
        with torch.device("meta"):
            build_expanded_backbone(cfg, tasks)
    except ConfigError as error:
        yield from error.problems
    except ValueError as error:
        norm = cfg.MODEL.RESNETS.NORM
        yield f"Reconciliation layers with MODEL.RESNETS.NORM {norm!r} do not fit these branches: {error}."


def _on_meta(cfg: CfgNode, dilation: int = 0) -> Branch:
    with torch.device("meta"):
        return build_branch(cfg, out_features=STAGES, res5_dilation=dilation)


def start_of(cfg: CfgNode, specs: Sequence[BranchSpec], name: str) -> tuple[str, str]:
    """The setting that says what a branch starts from, and its value: a file, a task of EXTEND, random or nothing."""
    own = next((spec.weights for spec in specs if spec.name == name), "")
    if own:
        return f"XLEARNER.BRANCHES.{name}.WEIGHTS", own
    if cfg.XLEARNER.EXTEND:
        return "XLEARNER.EXTEND_INIT", cfg.XLEARNER.EXTEND_INIT
    return "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS


def _misfit(network: torch.nn.Module, setting: str, path: str) -> list[str]:
    """Why a file on disk cannot start a network; files from elsewhere are not fetched for this."""
    if path in ("", RANDOM) or not Path(path).is_file():
        return []
    try:
        if setting == "MODEL.WEIGHTS" and is_expanded(path):
            return []
        check_resnet(network, path)
    except ConfigError as error:
        more = len(error.problems) - 1
        rest = f" And {more} more." if more else ""
        return [f"{setting} is {path!r}, which does not fit: {error.problems[0]}{rest}"]
    return []


def _lack_of_trunk(cfg: CfgNode) -> list[str]:
    """Whether a trunk is to start as an expanded model that has none."""
    path = cfg.MODEL.WEIGHTS
    if not (cfg.XLEARNER.SHARING == "shared" or starts_from_trunk(cfg)) or not Path(path).is_file():
        return []
    if not is_expanded(path) or any(_of_trunk(name) for name in read_checkpoint(path)["model"]):
        return []
    wish = "name a network's file, or an expanded model of hard sharing"
    return [f"MODEL.WEIGHTS is {path!r}, an expanded model without a trunk for the trunk to start as: {wish}."]


def _of_trunk(name: str) -> bool:
    return name.startswith(f"backbone.branches.{TRUNK}.")


def is_expanded(path: str) -> bool:
    """Whether a checkpoint is that of an expanded model."""
    return "tasks" in read_checkpoint(path).get("xlearner", {})


def _check_student(
    cfg: CfgNode, tasks: Sequence[TaskSpec], branches: Mapping[str, Branch], givers: Mapping[str, Branch]
) -> list[str]:
    """Found now, as the student is built after hours of expansion."""
    if problem := _two_res5(cfg, tasks):
        return [problem]
    start, names = cfg.XLEARNER.SQUEEZE.INIT, [task.name for task in tasks]
    if start not in names and not _is_start(start):
        return [f"XLEARNER.SQUEEZE.INIT is {start!r}, no task and no file.{nearest(start, [*names, RANDOM])}"]
    student = _on_meta(student_config(cfg, tasks))
    problems = _check_hints(cfg, student, givers) if givers and squeezes(cfg) else []
    if start not in names:
        return [*problems, *_misfit(student, "XLEARNER.SQUEEZE.INIT", start)]
    branch = branches[start] if start in branches else next(iter(branches.values()))
    if fits(branch, student):
        return problems
    got = f"{network_name(student_config(cfg, tasks))} with {', '.join(student.stage_names)}"
    has = f"{network_name(branch_config(cfg, start))} with {', '.join(branch.stage_names)}"
    return [
        *problems,
        f"XLEARNER.SQUEEZE.INIT is {start!r}, but the student is {got}, and that branch is {has}: set it to random.",
    ]


def squeezes(cfg: CfgNode) -> bool:
    """Whether a run has a student."""
    return cfg.XLEARNER.STAGE != "expand" or bool(cfg.XLEARNER.SQUEEZE.ONLINE)


def _check_hints(cfg: CfgNode, student: Branch, givers: Mapping[str, Branch]) -> list[str]:
    """Stages that the student is to learn from, but which no branch has, or some have at a larger stride than its own.

    Args:
        givers: branches that give hints, by task.
    """
    squeeze, problems = cfg.XLEARNER.SQUEEZE, []
    pairs = zip(squeeze.STAGES, squeeze.TEACHER_STAGES, squeeze.STAGE_WEIGHTS, strict=True)
    for stage, giver in [(stage, giver) for stage, giver, weight in pairs if weight]:
        what = f"XLEARNER.SQUEEZE.TEACHER_STAGES has {giver} for {stage} of the student"
        own = student.output_shape()[stage].stride
        given = {task: shapes[giver] for task, of in givers.items() if giver in (shapes := of.output_shape())}
        if not given:
            problems.append(
                f"{what}, but no branch that gives hints has it, as no head reads it: name a shallower one."
            )
        larger = {task: shape.stride for task, shape in given.items() if own % shape.stride}
        odd = {shapes[giver].channels for of in givers.values() if giver in (shapes := of.output_shape())}
        odd = {channels for channels in odd if channels.bit_count() != 1}
        if squeeze.NORMALISER == "phi_s" and odd:
            wish = "phi_s needs powers of two: name another SQUEEZE.NORMALISER"
            problems.append(f"{what}, which has {', '.join(map(str, sorted(odd)))} channels, but {wish}.")
        if larger:
            listed = ", ".join(f"that of {task} {stride}" for task, stride in larger.items())
            cure = "set MODEL.RESNETS.RES5_DILATION alike in the OPTS of their sources, or name a shallower stage"
            problems.append(f"{what}, whose stride is {own}, but {listed}: {cure}.")
    return problems


def _two_res5(cfg: CfgNode, tasks: Sequence[TaskSpec]) -> str:
    """Branches may differ in the stride of res5; heads that share a trunk cannot, as all of the student's do."""
    shared = cfg.XLEARNER.SHARING == "shared" or starts_from_trunk(cfg)
    squeezed = cfg.XLEARNER.SQUEEZE.TASK_LOSSES and squeezes(cfg)
    strides = {task.name: 32 // task.res5_dilation for task in tasks if STAGES[-1] in task.out_features}
    if len(set(strides.values())) < 2 or not (shared or squeezed):
        return ""
    listed = ", ".join(f"{name} has stride {stride}" for name, stride in strides.items())
    cure = "" if shared else ", or XLEARNER.SQUEEZE.TASK_LOSSES to False"
    cure += ", or XLEARNER.TRUNK_STEPS to 0" if starts_from_trunk(cfg) and not squeezed else ""
    return (
        f"The {'trunk' if shared else 'student'} has one res5, but the heads of the tasks want different strides of it "
        f"({listed}): set MODEL.RESNETS.RES5_DILATION alike in the OPTS of their sources{cure}."
    )


def fits(branch: Branch, student: Branch) -> bool:
    """Whether a student can start as a branch: whether both are built alike, as far as the branch goes."""
    parts = ("stem", *branch.stage_names)
    return _shapes(branch) == {name: of for name, of in _shapes(student).items() if name.partition(".")[0] in parts}


def _shapes(network: Branch) -> dict[str, torch.Size]:
    """Of its tensors, by name, but for the counters of norm layers: those of frozen stages have none."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not is_counter(name)}


def load_expanded(model: XLearner, cfg: CfgNode, path: Path) -> LoadReport:
    """Load an expanded checkpoint that is used as it is, strictly and by a config that agrees with its own.

    Raises:
        ConfigError: naming each tensor or setting that differs.
    """
    checkpoint = read_checkpoint(path)
    check_convention(cfg, checkpoint, path)
    return load_strictly(model, with_own_counters(model, checkpoint["model"]), path=path)


def initialise_branches(model: XLearner, cfg: CfgNode, specs: Sequence[BranchSpec], *, start: str = "") -> None:
    """Start from ``MODEL.WEIGHTS``, an expanded checkpoint as a whole or one file for all branches, or each its own.

    Of an expanded checkpoint of hard sharing, every branch starts as the trunk; reconciliation layers then start anew,
    which is as if there were none.

    Args:
        start: a file to start from instead of ``MODEL.WEIGHTS``.
    """
    if start:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = start
    weights = cfg.MODEL.WEIGHTS
    whole = bool(weights) and is_expanded(weights)
    fresh = {
        name: {key: value.clone() for key, value in branch.state_dict().items()}
        for name, branch in model.backbone.branches.items()
        if whole and start_of(cfg, specs, name)[1] == RANDOM
    }
    if whole:
        checkpoint = read_checkpoint(weights)
        for problem in differing_settings(cfg, stored_config(checkpoint), CONVENTION_KEYS, f"MODEL.WEIGHTS {weights}"):
            logger.warning(f"{problem} Features differ until trained.")
        state = with_own_counters(model, _from_trunk(model, checkpoint["model"]))
        report = load_strictly(model, state, path=weights)
        logger.info(f"Starting from the expanded model {weights}: {report}.")
    for name, state in fresh.items():
        model.backbone.branches[name].load_state_dict(state)
        logger.info(f"Branch {name} starts from random weights.")
    for name in model.backbone.branches:
        setting, path = start_of(cfg, specs, name)
        if path not in ("", RANDOM) and not (whole and setting == "MODEL.WEIGHTS"):
            logger.info(f"Starting branch {name} from {path}: {start_branch(model, name, path, cfg, heads=not whole)}.")


def settle_statistics(model: XLearner, cfg: CfgNode) -> None:
    """Give branches that start at random the running BN statistics of noise, in place of means of 0 and variances of 1.

    With these, what a branch sends to others before it has learned grows from block to block: at res4 of a ResNet-101
    to a root mean square of 700,000, where float16 ends at 65,504.
    """
    deviation = _PIXEL_DEVIATION / torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    noise = deviation * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = noise.to(model.device).contiguous(memory_format=model.backbone.memory_format)
    for branch in model.backbone.branches.values():
        norms = get_bn_modules(branch)
        if norms and not any(norm.running_mean.any() for norm in norms):
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                update_bn_stats(branch, [noise], 1)


def start_branch(model: XLearner, name: str, path: str, cfg: CfgNode, *, heads: bool) -> str:
    """Load a network's file into a branch; say what fitted.

    Args:
        heads: and into the res5 that its heads (C4) have of their own, as they are new as well.
    """
    branch = model.backbone.branches[name]
    said = [str(load_resnet(branch, path, pixels=PixelConvention.of(cfg)))]
    for source, head in model.heads.items() if heads else ():
        res5 = getattr(getattr(head, "roi_heads", None), "res5", None)
        if res5 is not None and model.backbone.branch_of[model.task_of[source]] == name:
            fits = load_res5(res5, branch, path)
            said.append(f"res5 of head {source} {'as well' if fits else 'stays random, as there is none that fits'}")
    return ", ".join(said)


def _from_trunk(model: XLearner, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of an expanded model, with the trunk of hard sharing in the place of each branch of ``model``."""
    if TRUNK in model.backbone.branches or not any(map(_of_trunk, state)):
        return state
    found = {name: value for name, value in state.items() if not _of_trunk(name)}
    for name, value in model.state_dict().items():
        if name.startswith("backbone.reconciliation."):
            found[name] = value
        elif name.startswith("backbone.branches."):
            in_trunk = f"backbone.branches.{TRUNK}.{name.split('.', 3)[3]}"  # after backbone.branches.<task>.
            if in_trunk in state:
                found[name] = state[in_trunk]
    return found
