#!/usr/bin/env python
"""Write a student's weights in the format of another library, checked there, with a model card.

python tools/export.py output/mine/student_d2.pth --to timm
python tools/export.py output/mine/student_d2.pth --to onnx --output backbone.onnx
"""

import argparse
import sys

from xlearner_d2.exports.write import FORMATS, export
from xlearner_d2.specs import ConfigError


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a student, such as student_d2.pth of a finished run")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("-o", "--output", default="", help="file, or folder for timm (default: beside the weights)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Write, check, say what there is."""
    done = export(args.weights, to=args.to, output=args.output)
    library = FORMATS[args.to].library
    print(f"{done.path}: features in {library} differ from the student's by at most {done.difference:.1e}.")
    print(f"{done.card}: the model card.")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ConfigError as error:
        sys.exit(f"error: {error}")
