"""Measure backbones on a suite of downstream sets; every cell is kept, so a study continues where it stopped.

python tools/transfer.py --suite configs/transfer/openmoji12.yaml --output output/transfer --seeds 3 --weights
    random=random squeezed=output/openmoji/student_d2.pth expanded/detection=output/openmoji/expanded.pth:detection

NAME of NAME=PATH is a role (random, single, shared, separate, expanded, squeezed, or your own), or role/variant.
PATH is a ResNet checkpoint, "random", or an expanded checkpoint and a task (PATH:TASK); "{seed}" in it is replaced.
"""

import argparse
import logging
from pathlib import Path

from ..report.transfer import report_folder
from ..results.records import read_records
from ..results.statistics import SUBJECT, check_subject
from ..transfer.backbones import parse_backbones
from ..transfer.command_line import base_parser, log_progress, seeds_of
from ..transfer.measure import measure
from ..transfer.places import Places

logger = logging.getLogger("xlearner_d2.transfer")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = base_parser(__doc__ or "", jobs="cells")
    parser.add_argument("--suite", required=True, help="a YAML file, as those in configs/transfer")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["random=random"],
        metavar="NAME=PATH",
        help="backbones: a file, {seed} in its path stands for each seed; FILE:TASK for a branch; random (the default)",
    )
    parser.add_argument("--output", default="output/transfer", help="folder of the study (default: %(default)s)")
    parser.add_argument(
        "--subject", help="the NAME or role that the report judges (default: squeezed, or without it the last NAME)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the suite and all data, list the cells, stop")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides of the suite, as pairs of key and value"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Check everything, run what is not finished, report."""
    log_progress()
    backbones = parse_backbones(args.weights)
    names = [backbone.name for backbone in backbones]
    known = [*names, *(record.backbone for record in read_records(args.output))]
    subject = args.subject or (SUBJECT if SUBJECT in known else names[-1])
    check_subject(subject, known)
    measure(
        args.suite,
        backbones,
        seeds_of(args),
        Path(args.output),
        opts=args.opts,
        places=Places(args.jobs),
        dry_run=args.dry_run,
    )
    if not args.dry_run:
        page = report_folder(args.output, subject=subject)
        logger.info(f"The report is {page}.")
