#!/usr/bin/env python
"""Run a step whose loss was not finite again, from the file that the run left, and show where it begins.

python tools/replay.py output/mine/expand/failed_step_0000123_worker_0.pth
"""

import argparse
import sys

import xlearner_d2  # noqa: F401  registers the meta-architecture
from xlearner_d2.engine.failure import read_failure
from xlearner_d2.engine.replay import describe, replay
from xlearner_d2.specs import ConfigError


def main() -> int:
    """Print what the step gave then and now; 1 if a loss is not finite again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="failed_step_*.pth in a stage's folder")
    failure = read_failure(parser.parse_args().file)
    result = replay(failure)
    print(describe(failure, result))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
