"""How a student came about: what its file and its model card tell."""

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import detectron2
from detectron2.data import MetadataCatalog

from .plan import Plan
from .squeeze_settings import squeeze_config


def describe_training(plan: Plan) -> dict[str, Any]:
    """Sources with their data sets' licences, steps, command, commit, version and date, in plain values."""
    sources = {
        source.name: {
            "task": source.task,
            "config": source.config,
            "images": len(plan.data[source.name].train),
            "licences": {name: str(MetadataCatalog.get(name).get("license", "")) for name in source.train},
        }
        for source in plan.sources
    }
    return {
        "sources": sources,
        "steps": _steps(plan),
        "sharing": plan.cfg.XLEARNER.SHARING,
        "command": shlex.join(sys.argv),
        "commit": git("describe", "--always", "--dirty", "--abbrev=12"),
        "version": f"xlearner_d2 {_version()}, detectron2 {detectron2.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _steps(plan: Plan) -> str:
    images = f"{plan.drawn[plan.stages[-1]].images_per_step:.4g}"
    squeeze = squeeze_config(plan.cfg).SOLVER.MAX_ITER
    trunk = f"{steps} of a shared trunk, then " if (steps := plan.cfg.XLEARNER.TRUNK_STEPS) else ""
    if plan.cfg.XLEARNER.SQUEEZE.ONLINE:
        return f"{trunk}{plan.cfg.SOLVER.MAX_ITER} of expansion and squeeze at once"
    expand = "" if plan.cfg.XLEARNER.SQUEEZE.TEACHER else f"{trunk}{plan.cfg.SOLVER.MAX_ITER} of expansion, then "
    return f"{expand}{squeeze} of squeeze, of {images} images each"


def _version() -> str:
    try:
        return metadata.version("xlearner_d2")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "of a checkout"


def git(*args: str) -> str:
    """What git says of the checkout that this code is in; empty without one, or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", *args], cwd=root, text=True, capture_output=True, check=False).stdout.strip()
    except OSError:
        return ""
