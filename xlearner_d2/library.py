"""The project as a library: what the commands do, called from a program or a notebook."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from .engine.plan import EXPANDED_FILE, STUDENT_FILE
from .engine.run import run
from .engine.stopping import RunStopped
from .exports.student import Student, load_student
from .exports.write import Exported, export

__all__ = ["Exported", "Student", "Trained", "export", "load_student", "train"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run has left.

    Attributes:
        expanded: file of the expanded model; None if this run, and none before it in the folder, has made one.
        student: file of the student; None likewise.
        metrics: what ``metrics.json`` holds: of the expanded model, the trivial predictors, and the student's probes.
    """

    expanded: Path | None
    student: Path | None
    metrics: Mapping[str, Any]


def train(cfg: CfgNode, *, resume: bool = False) -> Trained:
    """Expand, squeeze, export and evaluate in this process, as ``XLEARNER.STAGE`` says; files go to ``OUTPUT_DIR``.

    Args:
        cfg: as :func:`xlearner_d2.load_config` gives it.
        resume: continue a run that was stopped.

    Raises:
        ConfigError: with all problems of the config and its data, before anything is written.
        RunStopped: when a signal or a full disk ends the run, or a loss is not finite.
    """
    try:
        metrics = run(cfg, argparse.Namespace(resume=resume, eval_only=False, dry_run=False))
    except RunStopped as stop:  # which ends a program without a word
        print(f"error: {stop}", file=sys.stderr, flush=True)
        raise
    files = [Path(cfg.OUTPUT_DIR) / name for name in (EXPANDED_FILE, STUDENT_FILE)]
    expanded, student = (path if path.is_file() else None for path in files)
    return Trained(expanded=expanded, student=student, metrics=metrics)
