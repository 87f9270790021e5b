"""A whole run, as train_net.py starts it: plan, then the stages, then the closing table."""

import argparse
import copy
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from ..checkpoint.files import write_atomically
from ..checkpoint.stored import settings_of_its_own
from ..data.mappers import build_mapper
from ..evaluation.trivial import trivial_metrics
from ..modeling import XLearner
from ..modeling.branches import network_name
from ..report.pictures import draw_dataset_predictions
from ..specs import ConfigError
from .branches import load_expanded, student_config
from .evaluate import SourceResults, evaluate_sources, probe_student
from .explain import explain
from .plan import STUDENT_FILE, Plan, check_expanded, check_output, expanded_file, make_plan
from .resumed import describe_changes, keep_config
from .squeeze import SOURCE_RESULTS, squeeze
from .squeeze_settings import squeeze_batches
from .stopping import ending_on_signals, stopping_when_full
from .trainer import expand
from .trunk import train_trunk
from .workers import describe_workers, wait_for_all

logger = logging.getLogger(__name__)


def validate(cfg: CfgNode, args: argparse.Namespace, *, world_size: int) -> tuple[Plan, str]:
    """The plan of a run on so many workers, and its description; writes nothing.

    Raises:
        ConfigError: when the config, the data, a head or the output folder is not as needed.
    """
    plan = make_plan(cfg, world_size=world_size)
    if args.eval_only:
        check_expanded(plan)
    elif not args.dry_run or args.resume or plan.stages == ("squeeze",):
        check_output(plan, resume=args.resume)
    return plan, explain(plan)  # last: it tries steps, which takes longest


def run(cfg: CfgNode, args: argparse.Namespace, *, told: Sequence[logging.LogRecord] = ()) -> dict[str, Any]:
    """One worker: validate, then do what the config and the command line ask for; return what ``metrics.json`` holds.

    Args:
        told: warnings of a check before this one, which were shown.

    Raises:
        ConfigError: before anything is written, see :func:`validate`.
        RunStopped: when a signal or a full disk ends the run, or a loss is not finite.
    """
    with ending_on_signals(), stopping_when_full():
        with keeping_warnings(show=not told and comm.get_local_rank() == 0) as warnings:
            plan, description = validate(cfg, args, world_size=comm.get_world_size())
        wait_for_all()  # nothing is written before every worker has found the config and the data to be as needed
        check_same_data(plan)
        with nullcontext() if args.eval_only else alone_in(plan.cfg.OUTPUT_DIR):
            if not args.eval_only and comm.is_main_process():  # another run may have ended since
                check_output(plan, resume=args.resume)
            _set_up(plan, args, description, list({record.msg: record for record in (*told, *warnings)}.values()))
            return _run(plan, args)


def check_same_data(plan: Plan) -> None:
    """Workers draw images by their number, so each needs the same ones."""
    own = {
        f"XLEARNER.SOURCES.{source}.{part}": count
        for source, data in plan.data.items()
        for part, count in (("TRAIN", len(data.train)), ("TEST", sum(map(len, data.test.values()))))
    }
    (first, counts), *others = comm.all_gather((socket.gethostname(), own))
    problems = [
        f"{where} has {counts[where]} images on {first}, but {found.get(where, 0)} on {host}: are both copies whole?"
        for host, found in others
        for where in counts
        if found.get(where, 0) != counts[where]
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), what="The data")  # a machine has several workers


class _Keeper(logging.Handler):
    """Keeps warnings that come before there is a folder to log into, and shows them as Python does without it."""

    def __init__(self, *, show: bool):
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if self._show and logging.lastResort:
            logging.lastResort.handle(record)
        # As it can be sent to another process.
        record = copy.copy(record)
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


@contextmanager
def keeping_warnings(*, show: bool = True) -> Iterator[list[logging.LogRecord]]:
    """Such as those about the data, for the run's log; shown as well, as long as nobody else shows what is logged."""
    of = [logging.getLogger(name) for name in LOGGED]
    keeper = _Keeper(show=show and not any(logger.hasHandlers() for logger in of))
    for logger_ in of:
        logger_.addHandler(keeper)
    try:
        yield keeper.records
    finally:
        for logger_ in of:
            logger_.removeHandler(keeper)


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder, in which two would spoil each other's files; the main worker does.

    The lock ends with this process, however it ends, and processes that it forks do not have it.

    Raises:
        ConfigError: when another process has it.
    """
    if not comm.is_main_process():
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with (Path(folder) / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            wish = "wait until it has ended, or set another OUTPUT_DIR"
            raise ConfigError([f"Another process runs in OUTPUT_DIR {folder}: {wish}."], what="The output") from error
        except OSError:  # a file system without locks
            logger.debug("No lock in %s.", folder)
        yield


def _run(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    model = _load_expanded(plan) if args.eval_only else _train(plan, resume=args.resume)
    metrics: dict[str, Any] = {}
    if model is not None:
        folder = plan.stage_dir("expand") / "inference"
        metrics |= _report_expanded(plan, model, evaluate_sources(model, plan, plan.sources, folder=folder))
    if comm.is_main_process():
        path = Path(plan.cfg.OUTPUT_DIR) / "metrics.json"
        if path.is_file():  # of a stage that was run before
            metrics = {**json.loads(path.read_text()), **metrics}
        student = Path(plan.cfg.OUTPUT_DIR) / STUDENT_FILE
        if student.is_file():
            metrics |= _report_student(plan, student, metrics)
        write_atomically(json.dumps(metrics, indent=2) + "\n", path)
        logger.info(f"All results are in {path}.")
    wait_for_all()
    return metrics


def _set_up(plan: Plan, args: argparse.Namespace, description: str, warnings: Sequence[logging.LogRecord]) -> None:
    """Logs, which begin with the warnings so far, the copy of the config, and cuDNN."""
    folder, changes = plan.cfg.OUTPUT_DIR, ""
    if comm.is_main_process():
        os.makedirs(folder, exist_ok=True)
        if not args.eval_only:
            changes = describe_changes(plan.cfg)
            keep_config(plan.cfg)
    comm.synchronize()
    logging.raiseExceptions = False  # a log that cannot be written must not hide why
    for name in LOGGED:
        _log_into(folder, name)
    for handler in (handler for handler in _handlers["xlearner_d2"] if _is_file(handler)):
        for record in warnings:
            handler.handle(record)
    for handler in logging.getLogger("detectron2").handlers:
        if not _is_file(handler):  # an error is shown once, where the run ends
            handler.addFilter(lambda record: not record.exc_info)
    torch.backends.cudnn.benchmark = plan.cfg.CUDNN_BENCHMARK
    logger.info(f"Command: {args}")
    logger.info(f"Workers: {describe_workers()}.")
    logger.info(f"\n{description}")
    if changes:
        logger.warning(changes)


def _is_file(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) is not sys.stdout


#: Whose lines are in the log of a run.
LOGGED = ("fvcore", "detectron2", "xlearner_d2")
#: Handlers of an earlier run in this process, by logger.
_handlers: dict[str, list[logging.Handler]] = {}


def _log_into(folder: str, name: str) -> None:
    """Log to the console and into a folder, and no more into that of an earlier run."""
    of = logging.getLogger(name)
    for handler in _handlers.pop(name, []):
        of.removeHandler(handler)
    before = list(of.handlers)
    setup_logger.cache_clear()  # it does nothing for a folder and name that it has seen
    setup_logger(folder, distributed_rank=comm.get_rank(), name=name).setLevel(logging.INFO)
    _handlers[name] = [handler for handler in of.handlers if handler not in before]


def _train(plan: Plan, *, resume: bool) -> XLearner | None:
    """Run the stages; return the expanded model if this run has it."""
    model = None
    if "expand" in plan.stages:
        start = train_trunk(plan, resume_run=resume)
        model = expand(plan, resume_run=resume, start=start)
    if "squeeze" in plan.stages and not plan.cfg.XLEARNER.SQUEEZE.ONLINE:
        squeeze(plan, resume_run=resume)
    return model


def _load_expanded(plan: Plan) -> XLearner:
    path = expanded_file(plan.cfg)
    model = build_model(plan.cfg)
    logger.info(f"Evaluating {path}: {load_expanded(model, plan.cfg, path)}.")
    return model


def _report_expanded(plan: Plan, model: XLearner, results: SourceResults) -> dict[str, Any]:
    """Compare with predictors that learn nothing, draw predictions, show the table."""
    if not comm.is_main_process():
        return {}
    trivial = {
        source.name: {
            name: trivial_metrics(name, train_names=source.train, head=plan.heads[source.name]) for name in source.test
        }
        for source in plan.sources
        if source.train  # the constant answer comes from training data
    }
    folder = Path(plan.cfg.OUTPUT_DIR) / "pictures"
    if results:
        _draw(plan, model, folder)
        table = _table(results, trivial, ("expanded", "trivial predictor"))
        logger.info(f"The expanded model on each source's test data, in percent:\n{table}")
        logger.info(f"Pictures of its predictions are in {folder}.")
    else:
        logger.info("The expanded model is not evaluated, as no source has TEST.")
    return {"expanded": results, "trivial": trivial}


def _report_student(plan: Plan, weights: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Probe the student on downstream data, show this and what it has with the heads that it was squeezed with.

    Args:
        metrics: those of the expanded model, if they are known.
    """
    path = plan.stage_dir(squeeze_batches(plan.cfg)) / SOURCE_RESULTS
    own: SourceResults = json.loads(path.read_text()) if path.is_file() else {}
    if own:
        table = _table(own, metrics.get("expanded", {}), ("squeezed", "expanded"))
        logger.info(f"The student, with the heads that it was squeezed with, on each source's test data:\n{table}")
    probes = probe_student(plan, weights)
    if probes:
        rows = [(name, found["student"], found["random"]) for name, found in probes.items()]
        table = tabulate(rows, headers=["downstream data", "student", "random weights"], floatfmt=".1f")
        logger.info(f"The student's linear-probe accuracy, in percent:\n{table}")
    cfg = student_config(plan.cfg, plan.tasks)
    needed = ", ".join(f"{name} {value!r}" for name, value in settings_of_its_own(cfg).items())
    condition = f" and these settings, which are not Detectron2's own: {needed}" if needed else ""
    use = f"use {weights} as MODEL.WEIGHTS of any Detectron2 config with it{condition}"
    logger.info(f"The student is a plain {network_name(cfg)}: {use}.")
    return {"squeezed": own, "probes": probes}


def _table(results: SourceResults, others: SourceResults, names: tuple[str, str]) -> str:
    """Results of what is named first beside those of what is named second."""
    rows = [
        (source, name, metric, value, others.get(source, {}).get(name, {}).get(metric))
        for source, by_name in results.items()
        for name, found in by_name.items()
        for metric, value in found.items()
    ]
    return tabulate(rows, headers=["source", "test data", "metric", *names], floatfmt=".1f")


def _draw(plan: Plan, model: XLearner, folder: Path) -> None:
    model.eval()  # the heads' branches are not theirs to switch
    for source in plan.sources:
        mapper = build_mapper(plan.heads[source.name], is_train=False)
        for name, records in plan.data[source.name].test.items():
            with model.autocast():
                output = folder / f"{source.name}_{name}.png"
                draw_dataset_predictions(model.heads[source.name], name, mapper, output_file=output, records=records)
