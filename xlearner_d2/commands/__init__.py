"""The commands, one module each: ``python -m xlearner_d2 COMMAND …``, or their scripts in a checkout."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..specs import ConfigError

#: What each does, in the order in which one needs them.
COMMANDS = {
    "browse_data": "draw what the model will see of each source",
    "train": "expand, squeeze, export the student, evaluate",
    "replay": "run a step whose loss was not finite again",
    "export": "write the student in the format of another library",
    "transfer": "measure backbones on a suite of downstream sets",
    "study": "pre-train all baselines, then measure them",
    "report": "put the cells of transfer studies together",
}


def start(name: str, arguments: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Run a command; end with one message where the configuration, the data or a file is not as needed.

    Args:
        name: one of :data:`COMMANDS`; its module has ``make_parser()`` and ``run(args)``, which may give an exit code.
        arguments: those of the command line by default.
        prog: how the command is called, for its help.
    """
    command = importlib.import_module(f".{name}", __name__)
    parser: argparse.ArgumentParser = command.make_parser()
    parser.prog = prog or parser.prog
    try:
        code = command.run(parser.parse_args(arguments))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if code:
        sys.exit(code)
