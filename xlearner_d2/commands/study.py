"""A whole study: pre-train every backbone, measure all on a suite, report; continues where it was stopped.

python tools/study.py --study configs/transfer/openmoji12_study.yaml --seeds 3 --jobs 2 --output output/openmoji12
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..report.transfer import report_folder
from ..results.records import read_records
from ..results.statistics import check_subject
from ..specs import ConfigError
from ..transfer.command_line import base_parser, log_progress, seeds_of
from ..transfer.measure import check_folder, check_suite, measure
from ..transfer.places import Places
from ..transfer.pretraining import (
    StudySpec,
    backbones_of,
    check_output,
    check_runs,
    load_study,
    run_pretraining,
    unfinished_runs,
)

logger = logging.getLogger("xlearner_d2.transfer")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = base_parser(__doc__ or "", jobs="runs and cells")
    parser.add_argument("--study", required=True, help="a YAML file, as those in configs/transfer")
    parser.add_argument("--output", required=True, help="folder of the study")
    parser.add_argument("--subject", default="squeezed", help="the backbone that is judged (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check all configs and data, list the backbones, stop")
    return parser


def run(args: argparse.Namespace) -> None:
    """Seed by seed, so that a study that is stopped has whole seeds; where runs fail, what others left is measured."""
    log_progress()
    study, folder = load_study(args.study), Path(args.output)
    if not args.dry_run:
        check_folder(folder)
    check_suite(study.suite)
    check_runs(study, folder)
    check_output(study, seeds_of(args), folder)
    check_subject(args.subject, [*study.backbones, *(record.backbone for record in read_records(folder))])
    if args.dry_run:
        print("\n".join(f"{name}: {text}" for name, text in study.backbones.items()))
        return
    places = Places(args.jobs)
    for seed in seeds_of(args):
        meanwhile = partial(_measure_meanwhile, study, seed, folder, places)
        failed = [name for name, _ in run_pretraining(study, [seed], folder, places=places, meanwhile=meanwhile)]
        _measure(study, seed, folder, places, without=failed)
        if failed:
            raise ConfigError([f"{name}, seed {seed} failed." for name in failed], what="The pre-training")
        logger.info(f"The report is {report_folder(folder, subject=args.subject)}.")


def _measure(study: StudySpec, seed: int, folder: Path, places: Places, *, without: Sequence[str]) -> None:
    if found := backbones_of(study, folder, without=without):
        opts = ("XLEARNER.CHECK_IMAGES", "0")  # they were decoded when the study began
        measure(study.suite, found, [seed], folder, opts=opts, places=places)


def _measure_meanwhile(study: StudySpec, seed: int, folder: Path, places: Places) -> None:
    """What finished runs have left, while the last ones run, which should not wait for what fails here."""
    try:
        _measure(study, seed, folder, places, without=unfinished_runs(study, seed, folder))
    except Exception as error:
        told = str(error) if isinstance(error, ConfigError) else repr(error)
        logger.error(f"It is tried again when all runs have ended: {told}")
