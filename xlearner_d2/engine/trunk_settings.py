"""Settings of the trunk that a run may train first, checked before anything is trained."""

from detectron2.config import CfgNode


def check_trunk(cfg: CfgNode) -> list[str]:
    """Problems of ``XLEARNER.TRUNK_STEPS`` that show without data."""
    steps, problems = cfg.XLEARNER.TRUNK_STEPS, []
    if steps < 0:
        problems.append(f"XLEARNER.TRUNK_STEPS is {steps}, but a number of steps is expected, or 0 for no trunk.")
    if steps and cfg.XLEARNER.SHARING == "shared":
        wish = "but with XLEARNER.SHARING 'shared' there is no expansion after them: set SOLVER.MAX_ITER"
        problems.append(f"XLEARNER.TRUNK_STEPS is {steps}, {wish}.")
    if steps and cfg.XLEARNER.EXTEND:
        wish = "but XLEARNER.EXTEND names branches that are trained already: leave out one of the two"
        problems.append(f"XLEARNER.TRUNK_STEPS is {steps}, {wish}.")
    return problems


def starts_from_trunk(cfg: CfgNode) -> bool:
    """Whether a run's branches start as a trunk that it trains first."""
    return cfg.XLEARNER.STAGE != "squeeze" and bool(cfg.XLEARNER.TRUNK_STEPS)


def trunk_config(cfg: CfgNode) -> CfgNode:
    """The project's config for the steps of that trunk: hard sharing of the same sources."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = cfg.XLEARNER.TRUNK_STEPS
    cfg.XLEARNER.TRUNK_STEPS = 0
    cfg.XLEARNER.STAGE = "expand"
    cfg.XLEARNER.SHARING = "shared"
    cfg.XLEARNER.BRANCHES = CfgNode(new_allowed=True)
    cfg.XLEARNER.SQUEEZE.ONLINE = False
    return cfg
