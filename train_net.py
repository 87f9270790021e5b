#!/usr/bin/env python
"""Train one universal backbone from many sources: expand, squeeze, export, evaluate.

python train_net.py --config-file configs/quick/openmoji.yaml
python train_net.py --config-file … --dry-run | --resume | --eval-only | --num-gpus 8  XLEARNER.STAGE expand
"""

import argparse
import multiprocessing
import os
import sys

# Before torch is imported: threads that wait without spinning leave the processors to the data loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xlearner_d2 import load_config
from xlearner_d2.specs import ConfigError


def parse_args() -> argparse.Namespace:
    """Detectron2's own options, and ``--dry-run``."""
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="validate the config and all data, print the plan, start nothing"
    )
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is needed, for example --config-file configs/quick/openmoji.yaml")
    return args


def main(args: argparse.Namespace) -> None:
    """One worker's run."""
    if sys.platform == "linux":
        # A worker that was spawned would spawn its loader's processes, each of which imports everything again.
        multiprocessing.set_start_method("fork", force=True)
    from xlearner_d2.engine.run import run

    run(load_config(args.config_file, args.opts), args)


def start(args: argparse.Namespace) -> None:
    """Validate once, in this process, then start the workers."""
    from detectron2.engine import launch

    from xlearner_d2.engine.run import validate

    cfg = load_config(args.config_file, args.opts)
    workers = args.num_gpus * args.num_machines
    if args.dry_run:
        print(validate(cfg, args, world_size=workers)[1])
        return
    if workers > 1:  # errors of workers come with the tracebacks of all; and decoding images once is enough
        validate(cfg, args, world_size=workers)
        args.opts = [*args.opts, "XLEARNER.CHECK_IMAGES", "0"]
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    try:
        start(parse_args())
    except ConfigError as error:
        sys.exit(f"error: {error}")
