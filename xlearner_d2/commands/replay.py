"""Run a step whose loss was not finite again, from the file that the run left, and show where it begins.

python tools/replay.py output/mine/expand/failed_step_0000123_worker_0.pth
"""

import argparse

from ..engine.failure import read_failure
from ..engine.replay import describe, replay


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="failed_step_*.pth in a stage's folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what the step gave then and now; 1 if a loss is not finite again."""
    failure = read_failure(args.file)
    result = replay(failure)
    print(describe(failure, result))
    return 1 if result.wrong else 0
