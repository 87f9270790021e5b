"""A shared trunk first: steps of hard sharing, before the branches of the expansion start as their trunk."""

import logging
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode

from .plan import EXPANDED_FILE, Plan
from .trainer import expand, finished

logger = logging.getLogger(__name__)


def trunk_plan(plan: Plan) -> Plan:
    """The plan of these steps: of the same sources and heads, by hard sharing, in a folder of its own."""
    cfg = plan.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(plan.stage_dir("trunk"))
    cfg.SOLVER.MAX_ITER = plan.trunk_steps
    cfg.XLEARNER.TRUNK_STEPS = 0
    cfg.XLEARNER.STAGE = "expand"
    cfg.XLEARNER.SHARING = "shared"
    cfg.XLEARNER.BRANCHES = CfgNode(new_allowed=True)
    cfg.XLEARNER.SQUEEZE.ONLINE = False
    cfg.freeze()
    return replace(plan, cfg=cfg, branches=())


def train_trunk(plan: Plan, *, resume_run: bool) -> str:
    """Train the trunk; return its file, or "" if no expansion is to start from one."""
    if not plan.trunk_steps or (resume_run and finished(plan, "expand", EXPANDED_FILE)):
        return ""
    before = trunk_plan(plan)
    logger.info(f"First a shared trunk, for {plan.trunk_steps} steps, as which all branches start.")
    expand(before, resume_run=resume_run)
    return str(Path(before.cfg.OUTPUT_DIR) / EXPANDED_FILE)
