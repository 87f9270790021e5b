"""Train one universal backbone from many sources: expand, squeeze, export, evaluate.

python train_net.py --config-file configs/quick/openmoji.yaml
python train_net.py --config-file … --dry-run | --resume | --eval-only | --num-gpus 8  XLEARNER.STAGE expand
torchrun --nproc-per-node 8 train_net.py --config-file …
"""

import argparse

from detectron2.engine import default_argument_parser

from ..engine.launch import start

#: What Detectron2 says of its options, and what is so here.
_HELP = {
    "config_file": "the config: YAML, or Python",
    "resume": "go on from the last checkpoint in OUTPUT_DIR, from the beginning where there is none; a stage that left "
    "its result is not run again",
    "eval_only": "evaluate the expanded model of an earlier run",
    "opts": "settings that differ from the config, as pairs of KEY VALUE, of Python configs as well",
}


def make_parser() -> argparse.ArgumentParser:
    """Detectron2's own options, and ``--dry-run``."""
    parser: argparse.ArgumentParser = default_argument_parser(epilog=__doc__)
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    parser.add_argument(
        "--dry-run", action="store_true", help="validate the config and all data, print the plan, start nothing"
    )
    # A free port, where Detectron2 has a fixed one, which a second run on the machine would find taken.
    parser.set_defaults(dist_url="auto")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run both stages, or what the options ask for."""
    if not args.config_file:
        make_parser().error("--config-file is needed, for example --config-file configs/quick/openmoji.yaml")
    start(args)
