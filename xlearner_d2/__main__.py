"""``python -m xlearner_d2 COMMAND …``: what the scripts of a checkout do, for an installed package."""

import sys

from .commands import COMMANDS, start


def main() -> None:
    """Run the command that the command line names, or list them."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        start(name, sys.argv[2:], prog=f"xlearner-d2 {sys.argv[1]}")
        return
    width = max(map(len, COMMANDS))
    lines = [f"  {command.replace('_', '-'):{width}}  {what}" for command, what in COMMANDS.items()]
    print("\n".join(["usage: xlearner-d2 COMMAND …, each with its own --help", *lines]))
    if name not in ("", "__help", "_h"):
        sys.exit(f"error: {sys.argv[1]!r} is no command.")


if __name__ == "__main__":
    main()
