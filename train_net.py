#!/usr/bin/env python
"""Train one universal backbone from many sources: expand, squeeze, export, evaluate.

python train_net.py --config-file configs/quick/openmoji.yaml
python train_net.py --config-file … --dry-run | --resume | --eval-only | --num-gpus 8  XLEARNER.STAGE expand
torchrun --nproc-per-node 8 train_net.py --config-file …
"""

import argparse
import os
import sys

# Before torch is imported: threads that wait without spinning leave the processors to the data loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xlearner_d2.specs import ConfigError


def parse_args() -> argparse.Namespace:
    """Detectron2's own options, and ``--dry-run``."""
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="validate the config and all data, print the plan, start nothing"
    )
    # A free port, where Detectron2 has a fixed one, which a second run on the machine would find taken.
    parser.set_defaults(dist_url="auto")
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is needed, for example --config-file configs/quick/openmoji.yaml")
    return args


def main() -> None:
    """Run, or end with one message."""
    args = parse_args()
    from xlearner_d2.engine.launch import start

    try:
        start(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
