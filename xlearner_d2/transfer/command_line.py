"""What the commands of transfer studies share: options and logs."""

import argparse
import logging


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def seed(text: str) -> int:
    """A whole number from 0."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def base_parser(description: str, *, jobs: str) -> argparse.ArgumentParser:
    """A parser with the options that all commands have.

    Args:
        jobs: what runs several at a time.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="run the seeds 0 … SEEDS-1 (default: %(default)s)")
    parser.add_argument("--first-seed", type=seed, default=0, help="begin with another seed (default: %(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help=f"{jobs} at a time (default: %(default)s)")
    return parser


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds that the command line asks for."""
    return range(args.first_seed, args.first_seed + args.seeds)


def log_progress() -> None:
    """Show what is done, a line each."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("detectron2").setLevel(logging.WARNING)  # it tells of each set that it reads
