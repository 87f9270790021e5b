"""What a number of workers asks of a config: batches, learning rates and steps that fit it, and norm layers."""

from collections.abc import Iterator

from detectron2.config import CfgNode

from ..settings import usable_device
from ..specs import ConfigError


def scale_to_workers(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale a config that was written for ``SOLVER.REFERENCE_WORLD_SIZE`` workers (0: for any number) to these.

    Each worker keeps its share of a batch and the run its number of images: batches and learning rates grow with the
    number of workers, steps shrink, as Detectron2's ``auto_scale_workers`` does it.

    Raises:
        ConfigError: when the reference is no number of workers, or could not have shared the batches itself.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = usable_device(cfg)
    if reference < 0:
        raise ConfigError([f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, but a number of workers is expected, or 0."])
    if reference not in (0, world_size):
        scale = world_size / reference
        _scale_solver(cfg.SOLVER, scale)
        _scale_solver(cfg.XLEARNER.SQUEEZE.SOLVER, scale)
        cfg.XLEARNER.TRUNK_STEPS = _scale_steps(cfg.XLEARNER.TRUNK_STEPS, scale)
        cfg.TEST.EVAL_PERIOD = _scale_steps(cfg.TEST.EVAL_PERIOD, scale)
        _scale_batches(cfg, world_size, reference)
        cfg.SOLVER.REFERENCE_WORLD_SIZE = world_size
    cfg.freeze()
    return cfg


def _scale_batches(cfg: CfgNode, world_size: int, reference: int) -> None:
    records = {f"SOURCES.{name}": record for name, record in cfg.XLEARNER.SOURCES.items()}
    if cfg.XLEARNER.SAMPLING.IMS_PER_BATCH:  # which stands for those of the sources
        records = {}
    problems = []
    for name, record in {**records, "SAMPLING": cfg.XLEARNER.SAMPLING}.items():
        batch = record.get("IMS_PER_BATCH", 16) if isinstance(record, CfgNode) else None
        if not isinstance(batch, int):
            continue  # dropped, or a problem that is found later
        if batch % reference:
            shared = f"the {reference} workers of SOLVER.REFERENCE_WORLD_SIZE can share evenly"
            problems.append(f"XLEARNER.{name}.IMS_PER_BATCH is {batch}, but a number that {shared} is expected.")
        record.IMS_PER_BATCH = batch // reference * world_size
    if problems:
        raise ConfigError(problems)


def _scale_solver(solver: CfgNode, scale: float) -> None:
    """Scale those of these keys that are there: the learning rate up, steps down."""
    if "BASE_LR" in solver:
        solver.BASE_LR *= scale
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        if key in solver:
            solver[key] = _scale_steps(solver[key], scale)
    if "STEPS" in solver:
        solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)


def _scale_steps(steps: int, scale: float) -> int:
    """One at least of what are any: no steps would mean never, or nothing that can be run."""
    return max(round(steps / scale), min(steps, 1))


def check_norm(cfg: CfgNode, where: str, world_size: int) -> list[str]:
    """Norm layers that several workers cannot have: on CPUs, or in networks of timm."""
    if world_size == 1:
        return []
    problems = []
    if cfg.MODEL.RESNETS.NORM == "naiveSyncBN" and _has_timm(cfg):
        wish = "which networks of timm cannot have: take BN, or SyncBN on GPUs"
        problems.append(f"{where}.RESNETS.NORM is 'naiveSyncBN', {wish}.")
    if cfg.MODEL.DEVICE != "cpu":
        return problems
    return problems + [
        f"{where}.{key} is {value!r}, which torch has for GPUs alone: take naiveSyncBN on CPUs."
        for key, value in _leaves(cfg.MODEL)
        if key.endswith("NORM") and value in ("SyncBN", "nnSyncBN")
    ]


def _has_timm(cfg: CfgNode) -> bool:
    if "XLEARNER" not in cfg:  # the config of a head, whose network is that of a branch
        return False
    branches = [of.get("TIMM", "") for of in cfg.XLEARNER.BRANCHES.values() if isinstance(of, CfgNode)]
    return any([cfg.MODEL.BACKBONE.TIMM, cfg.XLEARNER.SQUEEZE.TIMM, *branches])


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_timeouts(cfg: CfgNode) -> list[str]:
    """Problems of the settings that the workers of a run need to find each other."""
    return [
        f"XLEARNER.TIMEOUT.{key} is {seconds}, but a number of seconds above 0 is expected."
        for key, seconds in cfg.XLEARNER.TIMEOUT.items()
        if not 0 < seconds < float("inf")
    ]
