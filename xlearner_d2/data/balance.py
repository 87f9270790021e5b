"""How often which image is seen: the shares of the sources in a step, and the sampling within a source."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler

from ..specs import ConfigError, SourceSpec
from .streams import ClassAware, Grouped, RepeatFactor, Shuffled, Stream

Record = Mapping[str, Any]

#: Detectron2's names in ``DATALOADER.SAMPLER_TRAIN`` -> ours.
DETECTRON2_SAMPLERS = {"TrainingSampler": "shuffle", "RepeatFactorTrainingSampler": "repeat_factor"}


def share_images(total: int, sizes: Mapping[str, int], *, temperature: float, workers: int = 1) -> dict[str, int]:
    """Share the images of a step among sources in proportion to ``size ** (1 / temperature)``.

    Args:
        total: images of a step, a multiple of ``workers``.
        sizes: number of images of each source.
        temperature: 1 shares by size, 2 by the square root of it, infinity evenly.
        workers: every share is a multiple of this, and at least this.

    Returns:
        the share of each source; together they are ``total``.

    Raises:
        ValueError: when ``total`` cannot be shared like this.
    """
    units = total // workers
    if total % workers or units < len(sizes):
        wish = f"{f'a multiple of {workers} of ' if workers > 1 else ''}at least {workers * len(sizes)}"
        raise ValueError(f"{total} images a step cannot be shared by {len(sizes)} sources: {wish} is needed")
    weights = {source: size ** (1 / temperature) for source, size in sizes.items()}
    least: dict[str, int] = {}
    while True:  # sources whose part is below one unit get one; the others share the rest
        rest = {source: weight for source, weight in weights.items() if source not in least}
        scale = (units - len(least)) / sum(rest.values()) if rest else 0.0
        small = {source: 1 for source, weight in rest.items() if weight * scale < 1}
        if not small:
            break
        least |= small
    parts = {source: weight * scale for source, weight in rest.items()}
    floors = {source: math.floor(part) for source, part in parts.items()}
    left = units - len(least) - sum(floors.values())
    by_remainder = sorted(parts, key=lambda source: floors[source] - parts[source])
    shares = {**least, **floors, **{source: floors[source] + 1 for source in by_remainder[:left]}}
    return {source: shares[source] * workers for source in sizes}


def classes_of(record: Record) -> set[int]:
    """Classes that a record's labels name: one or several of the image, of its boxes or of its panoptic segments.

    Crowds, from which no head learns, name none.
    """
    if "category_id" in record:
        return {record["category_id"]}
    if "category_ids" in record:
        return set(record["category_ids"])
    parts = [*record.get("annotations", ()), *record.get("segments_info", ())]
    return {part["category_id"] for part in parts if not part.get("iscrowd", 0)}


def sampler_of(source: SourceSpec, head: CfgNode) -> str:
    """The sampler that a source asks for, or else its head's config.

    Raises:
        ConfigError: when the config asks for another one than is known here.
    """
    if source.sampler:
        return source.sampler
    asked = head.DATALOADER.SAMPLER_TRAIN
    if asked not in DETECTRON2_SAMPLERS:
        message = f"{source.config} asks for DATALOADER.SAMPLER_TRAIN {asked!r}, but only"
        known = f"{' and '.join(DETECTRON2_SAMPLERS)} are known. Set SAMPLER of the source."
        raise ConfigError([f"XLEARNER.SOURCES.{source.name}: {message} {known}"])
    return DETECTRON2_SAMPLERS[asked]


def build_stream(source: SourceSpec, head: CfgNode, records: Sequence[Record], *, seed: int) -> Stream:
    """What a source's images are drawn from, as its SAMPLER and ``DATALOADER`` of its head's config say.

    Raises:
        ConfigError: when the records or the settings do not fit the sampler.
        ValueError: when there are no records.
    """
    if not records:
        raise ValueError(f"Source {source.name!r} has no images.")
    where, parts = f"XLEARNER.SOURCES.{source.name}", (seed, source.name)
    kind = sampler_of(source, head)
    stream: Stream = Shuffled(len(records), seed=parts)
    if kind != "shuffle":
        classes = [classes_of(record) for record in records]
        if not any(classes):
            message = f"the records have no class of images, boxes or segments, which the sampler {kind!r} goes by"
            raise ConfigError([f"{where}.TRAIN {list(source.train)}: {message}."])
        if kind == "class_aware":
            members: dict[int, list[int]] = {}
            for index, of in enumerate(classes):
                for found in of:
                    members.setdefault(found, []).append(index)
            stream = ClassAware([members[of] for of in sorted(members)], seed=parts)
        else:
            stream = RepeatFactor(_repeat_factors(classes, head, where), seed=parts)
    kinds = _orientations(records) if head.DATALOADER.ASPECT_RATIO_GROUPING and not _crops_squares(head) else []
    if len(set(kinds)) < 2:
        return stream
    return Grouped(stream, kinds=kinds, batch_size=source.ims_per_batch, seed=parts)


def _repeat_factors(classes: Sequence[set[int]], head: CfgNode, where: str) -> Any:
    threshold = head.DATALOADER.REPEAT_THRESHOLD
    if threshold <= 0:
        message = "the sampler 'repeat_factor' repeats nothing, as DATALOADER.REPEAT_THRESHOLD of its config is 0"
        raise ConfigError([f"{where}: {message}. Set it in OPTS, for example to 0.001 as for LVIS."])
    records = [{"annotations": [{"category_id": c} for c in of]} for of in classes]
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, threshold, sqrt=head.DATALOADER.REPEAT_SQRT
    )


def _orientations(records: Sequence[Record]) -> list[int]:
    """0 for each landscape image, 1 for each other one; empty when the records do not give the size of their images."""
    kinds = []
    for record in records:
        if "width" not in record or "height" not in record:
            return []
        kinds.append(int(record["width"] <= record["height"]))
    return kinds


def _crops_squares(head: CfgNode) -> bool:
    return head.MODEL.META_ARCHITECTURE == "ImageClassifier"
