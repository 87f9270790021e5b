"""How much of a training batch is padding, with and without grouping images by orientation.

DETECTRON2_DATASETS=… python benchmarks/padding.py --config-file configs/quick/real.yaml

Sizes are those that ResizeShortestEdge gives the images of each batch of 1000 steps, with MIN_SIZE_TRAIN and
MAX_SIZE_TRAIN of the source's head; images are not decoded. Cropped squares (classification) are left out.
"""

import argparse

import numpy as np
from detectron2.data import transforms as T
from tabulate import tabulate

from xlearner_d2 import load_config
from xlearner_d2.data.balance import build_stream
from xlearner_d2.engine.plan import Plan, make_plan
from xlearner_d2.specs import SourceSpec

STEPS = 1000
DIVISIBILITY = 32


def padded_share(plan: Plan, source: SourceSpec, *, grouped: bool) -> float:
    """Padding, as a share of the pixels of the batches."""
    head = plan.heads[source.name].clone()
    head.defrost()
    head.DATALOADER.ASPECT_RATIO_GROUPING = grouped
    records = plan.data[source.name].train
    stream = build_stream(source, head, records, seed=0)
    choices, longest, own, whole = head.INPUT.MIN_SIZE_TRAIN, head.INPUT.MAX_SIZE_TRAIN, 0.0, 0.0
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        sizes = []
        for position in range(step * source.ims_per_batch, (step + 1) * source.ims_per_batch):
            record = records[stream.draw(position)[0]]
            short = int(rng.choice(choices))
            sizes.append(T.ResizeShortestEdge.get_output_shape(record["height"], record["width"], short, longest))
        height, width = np.ceil(np.max(sizes, axis=0) / DIVISIBILITY) * DIVISIBILITY
        own += float(np.prod(sizes, axis=1).sum())
        whole += height * width * len(sizes)
    return 1 - own / whole


def main() -> None:
    """Print one row for each source whose records give the sizes of their images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    plan = make_plan(load_config(args.config_file, [*args.opts, "XLEARNER.CHECK_IMAGES", "0"]), world_size=1)
    rows = []
    for source in plan.sources:
        records = plan.data[source.name].train
        if plan.heads[source.name].MODEL.META_ARCHITECTURE == "ImageClassifier" or "width" not in records[0]:
            continue
        portrait = sum(record["width"] <= record["height"] for record in records) / len(records)
        shares = [padded_share(plan, source, grouped=grouped) for grouped in (False, True)]
        rows.append((source.name, source.ims_per_batch, f"{portrait:.0%}", *(f"{share:.1%}" for share in shares)))
    print(tabulate(rows, headers=["source", "batch", "portrait", "padding", "padding, grouped"]))


if __name__ == "__main__":
    main()
