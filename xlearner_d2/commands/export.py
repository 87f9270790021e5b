"""Write a student's weights in the format of another library, checked there, with a model card.

python tools/export.py output/mine/student_d2.pth --to timm
python tools/export.py output/mine/student_d2.pth --to onnx --output backbone.onnx
"""

import argparse

from ..exports.write import FORMATS, export


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a student, such as student_d2.pth of a finished run")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("-o", "--output", default="", help="file, or folder for timm (default: beside the weights)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write, check, say what there is."""
    done = export(args.weights, to=args.to, output=args.output)
    library = FORMATS[args.to].library
    print(f"{done.path}: features in {library} differ from the student's by at most {done.difference:.1e}.")
    print(f"{done.card}: the model card.")
