"""Draw what a run's model would see: each source's images after mapping, with their labels, on one sheet a source.

python tools/browse_data.py --config-file mine.yaml --output output/browse
python tools/browse_data.py --config-file mine.yaml --source birds --split test --num 32 --output output/browse
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import load_config
from ..data.loader import build_joint_train_loader
from ..data.mappers import build_mapper
from ..engine.plan import Plan, make_plan
from ..report.browse import describe_sizes, draw_sheet, panoptic_names
from ..specs import ConfigError, SourceSpec, nearest

Record = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="as for train_net.py")
    parser.add_argument("--source", action="append", help="name of a source; can be repeated (default: all)")
    parser.add_argument("--num", type=int, default=16, help="images of each source (default: %(default)s)")
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="train: the first images that a run sees, as augmented; test: images spread over each test set",
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings, as for train_net.py")
    return parser


def choose(plan: Plan, names: list[str] | None) -> list[SourceSpec]:
    """The sources of these names; all without names.

    Raises:
        ConfigError: for a name that no source has.
    """
    known = {source.name: source for source in plan.sources}
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise ConfigError([f"--source names {name!r}, which is no source.{nearest(name, known)}" for name in wrong])
    return [known[name] for name in names or known]


def seen_in_training(plan: Plan, source: SourceSpec, count: int) -> list[Record]:
    """The first ``count`` images that a run sees of a source: a source's order depends on nothing but the seed."""
    records = {source.name: plan.data[source.name].train}
    loader = build_joint_train_loader([source], plan.heads, records, seed=max(plan.cfg.SEED, 0), num_workers=0)
    found: list[Record] = []
    for batch in loader:
        found += batch[source.name]
        if len(found) >= count:
            break
    return found[:count]


def seen_in_test(plan: Plan, source: SourceSpec, count: int) -> Iterator[tuple[str, list[Record]]]:
    """Name and ``count`` images of each test set, evenly spread, with their labels."""
    mapper = build_mapper(without_augmentation(plan.heads[source.name]), is_train=not is_classifier(plan, source))
    for name, records in plan.data[source.name].test.items():
        step = max(len(records) // count, 1)
        mapped = (mapper(record) for record in records[: step * count : step])
        yield name, [record for record in mapped if record is not None]


def is_classifier(plan: Plan, source: SourceSpec) -> bool:
    """Whether the mapper for tests gives labels, as it does for images with labels of their own alone."""
    return bool(plan.heads[source.name].MODEL.META_ARCHITECTURE == "ImageClassifier")


def without_augmentation(head: CfgNode) -> CfgNode:
    """The config whose mapper for training, which alone gives labels, sizes images as the one for tests does."""
    head = head.clone()
    head.defrost()
    head.INPUT.MIN_SIZE_TRAIN = (head.INPUT.MIN_SIZE_TEST,)
    head.INPUT.MAX_SIZE_TRAIN = head.INPUT.MAX_SIZE_TEST
    head.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    head.INPUT.RANDOM_FLIP = "none"
    head.INPUT.CROP.ENABLED = False
    head.INPUT.COLOR_JITTER = 0.0
    return head


def run(args: argparse.Namespace) -> None:
    """Read, map, draw."""
    if args.num < 1:
        raise ConfigError([f"--num is {args.num}, but at least 1 is expected."], what="The command line")
    # Whether images are whole is for --dry-run to find out.
    opts = [*args.opts, "XLEARNER.CHECK_IMAGES", "0", "OUTPUT_DIR", str(Path(args.output).absolute())]
    plan = make_plan(load_config(args.config_file, opts), world_size=1)
    chosen = choose(plan, args.source)
    if lacking := [source.name for source in chosen if not getattr(source, args.split)]:
        if args.source or len(lacking) == len(chosen):
            wish = f"but --split {args.split} draws that"
            raise ConfigError([f"XLEARNER.SOURCES.{name} has no {args.split.upper()}, {wish}." for name in lacking])
        print(f"Without {args.split.upper()}, and so not drawn: {', '.join(lacking)}.")
    for source in (source for source in chosen if source.name not in lacking):
        if args.split == "train":
            sheets = [(source.train[0], source.name, seen_in_training(plan, source, args.num))]
        else:
            sheets = [(name, f"{source.name}_{name}", found) for name, found in seen_in_test(plan, source, args.num)]
        for name, stem, found in sheets:
            title = f"{stem}, {args.split}: {describe_sizes(found)}"
            file = Path(args.output) / f"{stem}_{args.split}.png"
            image_format = plan.heads[source.name].INPUT.FORMAT
            metadata = MetadataCatalog.get(name)
            if plan.heads[source.name].MODEL.META_ARCHITECTURE == "PanopticFPN":
                metadata = panoptic_names(metadata)
            draw_sheet(found, metadata, output_file=file, title=title, image_format=image_format)
            print(f"{file}: {len(found)} {describe_sizes(found)}", flush=True)
