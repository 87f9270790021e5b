"""Put the cells of one or more folders of a transfer study together: results.json, tables.md and report.html.

python tools/report.py output/transfer
python tools/report.py seed0 seed1 seed2 --output report --subject squeezed --primary linear_probe boxes
"""

import argparse
from pathlib import Path

from ..report.transfer import choose_primary, read_studies, write_report
from ..results.statistics import SUBJECT, analyse


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folders that hold cells/, such as one for each seed"
    )
    parser.add_argument("--output", help="where to write (default: the first folder)")
    parser.add_argument(
        "--subject", default=SUBJECT, help="backbone, or role of one backbone, that is judged (default: %(default)s)"
    )
    parser.add_argument(
        "--primary",
        nargs="+",
        default=[],
        metavar="PROTOCOL",
        help="protocols in order of preference: the first one that a set has is what summaries take of it "
        "(default: what the suite says)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Read, compute, write."""
    records = read_studies(args.folders)
    study = analyse(records, subject=args.subject, primary=choose_primary(records, args.primary))
    output = Path(args.output or args.folders[0])
    write_report(study, records, output)
    print(f"{len(records)} cells, {len(study.missing)} missing: {output / 'report.html'}")
