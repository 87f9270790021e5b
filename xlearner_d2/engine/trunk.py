"""A shared trunk first: steps of hard sharing, before the branches of the expansion start as their trunk."""

import gc
import logging
from dataclasses import replace
from pathlib import Path

from .plan import EXPANDED_FILE, Plan
from .trainer import expand, finished
from .trunk_settings import trunk_config

logger = logging.getLogger(__name__)


def train_trunk(plan: Plan, *, resume_run: bool) -> str:
    """Train the trunk; return its file, or "" if the expansion has none to start from, or has started already."""
    begun = (plan.stage_dir("expand") / "last_checkpoint").is_file() or finished(plan, "expand", EXPANDED_FILE)
    if not plan.trunk_steps or (resume_run and begun):
        return ""
    logger.info(f"First a shared trunk, for {plan.trunk_steps} steps, as which all branches start.")
    before = trunk_plan(plan)
    expand(before, resume_run=resume_run)
    gc.collect()  # what trained it refers to itself, and would take memory beside what trains the branches
    return str(Path(before.cfg.OUTPUT_DIR) / EXPANDED_FILE)


def trunk_plan(plan: Plan) -> Plan:
    """The plan of these steps: of the same sources and heads, in a folder of its own."""
    cfg = trunk_config(plan.cfg)
    cfg.OUTPUT_DIR = str(plan.stage_dir("trunk"))
    cfg.freeze()
    return replace(plan, cfg=cfg, branches=())
