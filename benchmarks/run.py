"""Measure what the project costs, as ratios against what it has to cost, and draw how cost grows.

All ratios come from runs in turn within one process, so they hold on a machine that does other work as well. Prints the
median of each ratio with its quartiles; writes ``ratios.json`` and ``scaling.png``. On a machine with a GPU, it is the
GPU that is measured.

    python benchmarks/run.py                                   # all ratios: about ten minutes on one CPU core
    python benchmarks/run.py --only "squeeze step" memory
    python benchmarks/run.py --only "squeeze step" --by calls
    python benchmarks/run.py --only scaling coco loader
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from coco_evaluation import coco_evaluation
from loading import loader
from models import compute_as_on_a_gpu
from ratios import RATIOS, Found
from scaling import scaling
from timing import machine

BENCHMARKS = {**RATIOS, "coco": coco_evaluation, "loader": loader, "scaling": scaling}


#: Those whose comparisons can be by the number of calls.
COUNTED = [name for name in RATIOS if name not in ("memory", "small maps", "upsampling")]
#: Those that are in mixed precision, or not, whatever the command says.
AMP = {"one-source step": False, "small maps": True, "exported student": False, "upsampling": False}


def main() -> None:
    """Run what was asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each comparison")
    wish = "compare time, or calls of PyTorch, which take most of the time of small networks on a GPU"
    parser.add_argument("--by", choices=["time", "calls"], default="time", help=wish)
    parser.add_argument("--images", type=int, default=8, help="images of each source in a step")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder of the results")
    args = parser.parse_args()
    args.only = args.only or (COUNTED if args.by == "calls" else list(BENCHMARKS))
    timed = [name for name in args.only if name not in COUNTED]
    if args.by == "calls" and timed:
        parser.error(f"--by calls counts those of {', '.join(COUNTED)}, but --only has {', '.join(timed)}")
    torch.set_num_threads(args.threads)
    if args.by == "calls":
        compute_as_on_a_gpu()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "ratios.json"
    where = machine()  # before the first: HEAD may move meanwhile
    results: dict[str, Found] = json.loads(file.read_text()) if file.is_file() else {}
    for name in args.only:
        found = BENCHMARKS[name](args)
        results[name] = found
        print_found(name, found)
        settings = {key: getattr(args, key) for key in ("by", "rounds", "images", "size")}
        settings["amp"] = AMP.get(name, args.amp)
        results[name]["measured with"] = {**where, **settings}  # type: ignore[assignment]
        file.write_text(json.dumps(results, indent=2) + "\n")


def print_found(name: str, found: Found) -> None:
    """One line for each comparison."""
    for case, values in found.items():
        spread = f" (quartiles {values['q1']:.3f} to {values['q3']:.3f})" if "q1" in values else ""
        rest = ", ".join(f"{k} {v:g}" for k, v in values.items() if k not in ("ratio", "q1", "q3"))
        head = f" {values['ratio']:.3f}{spread};" if "ratio" in values else ""
        print(f"{name}, {case}:{head} {rest}", flush=True)


if __name__ == "__main__":
    main()
