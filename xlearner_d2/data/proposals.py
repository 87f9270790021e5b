"""Pre-computed proposals, for heads that take boxes from a file instead of a region proposal network (Fast R-CNN)."""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.build import load_proposals_into_dataset

from ..specs import ConfigError, SourceSpec
from .problems import Problems

Records = list[dict[str, Any]]


def proposal_files(source: SourceSpec, head: CfgNode) -> tuple[dict[str, str], dict[str, str]]:
    """The proposal file of each data set of a source, as ``DATASETS.PROPOSAL_FILES_*`` of its head gives them.

    Returns:
        files by data set, for training and for test; empty when the head loads no proposals.

    Raises:
        ConfigError: when there is not one file for each data set.
    """
    if not head.MODEL.LOAD_PROPOSALS:
        return {}, {}
    problems = []
    parts = {"TRAIN": source.train, "TEST": source.test}
    files = {key: head.DATASETS[f"PROPOSAL_FILES_{key}"] for key in parts}
    for key, names in parts.items():
        if len(files[key]) != len(names):
            problems.append(
                f"XLEARNER.SOURCES.{source.name}: {source.config} loads pre-computed proposals, but has "
                f"{len(files[key])} files for {len(names)} data sets in {key}: set DATASETS.PROPOSAL_FILES_{key} in "
                "the OPTS of the source to one file for each."
            )
    if problems:
        raise ConfigError(problems)
    train, test = (dict(zip(parts[key], files[key], strict=True)) for key in parts)
    return train, test


def with_proposals(name: str, records: Sequence[dict[str, Any]], file: str) -> Records:
    """Copies of a data set's records with the proposals of a file, which Detectron2 reads.

    The file is a pickle of ``ids`` of images, ``boxes`` (N, 4) and ``objectness_logits`` (N,) of each and, if boxes
    are not (x0, y0, x1, y1) in pixels, ``bbox_mode``. Unpickling runs code, so take it from whom you trust.

    Raises:
        ConfigError: when the file cannot be read, or lacks an image or well-formed boxes for it.
    """
    subject = f"data set {name!r}: the proposal file {file}"
    copies = [{**record} for record in records]
    if any("image_id" not in record for record in copies):
        raise ConfigError([f"{subject} gives boxes by image_id, but not all records have one."], what="The data")
    try:
        load_proposals_into_dataset(copies, file)
    except KeyError as error:
        raise ConfigError([f"{subject} lacks the image or key {error}."], what="The data") from error
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError([f"{subject} cannot be read: {error!r}"], what="The data") from error
    problems = Problems(f"data set {name!r}")
    for record in copies:
        boxes, scores = (np.asarray(record[f"proposal_{key}"]) for key in ("boxes", "objectness_logits"))
        if boxes.shape != (len(scores), 4) or not np.isfinite(boxes).all():
            text = f"{file} has boxes of shape {boxes.shape} and {len(scores)} scores for image {record['image_id']!r}"
            problems.add("malformed proposals", f"{text}, but finite boxes (N, 4) and N scores are expected.")
    if problems:
        raise ConfigError(problems.lines(), what="The data")
    return copies
