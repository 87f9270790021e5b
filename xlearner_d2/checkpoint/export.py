"""What leaves the project: the student as a Detectron2 checkpoint, and the expanded model with its own description."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..specs import TaskSpec
from .files import save_atomically
from .load import is_counter


def input_convention(cfg: CfgNode) -> dict[str, Any]:
    """What a user of the weights has to feed: channel order and normalisation."""
    return {
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
    }


def _plain(node: CfgNode) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, list | tuple) else value for key, value in node.items()}


def describe_student(cfg: CfgNode, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a student's file says of itself, in plain values: its network, its input, and how it was made."""
    return {
        "resnets": _plain(cfg.MODEL.RESNETS),
        "timm": str(cfg.MODEL.BACKBONE.get("TIMM", "")),
        "input": input_convention(cfg),
        "training": dict(training or {}),
    }


def export_student(
    student: nn.Module, cfg: CfgNode, path: str | Path, *, training: Mapping[str, Any] | None = None
) -> None:
    """Save the student's backbone, and nothing else, as a file that ``MODEL.WEIGHTS`` of any Detectron2 config takes.

    Names start at ``stem`` and ``res2``, as in Detectron2's own ImageNet files, and ask for the same matching, which
    finds them in a plain, FPN, C4 or DC5 backbone alike. ``num_batches_tracked`` is left out: frozen BN has none.

    Args:
        cfg: describes the student's network and its input.
        training: how it was made, in plain values; kept in the file.
    """
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in student.state_dict().items()
        if not is_counter(name)
    }
    data = {"model": state, "__author__": "xlearner_d2", "matching_heuristics": True}
    data["xlearner"] = describe_student(cfg, training)
    save_atomically(data, path)


def save_expanded(
    model: nn.Module,
    cfg: CfgNode,
    tasks: Sequence[TaskSpec],
    path: str | Path,
    *,
    classes: Mapping[str, Sequence[Any]] | None = None,
    class_names: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> None:
    """Save the expanded model with what is needed to build it again without its sources' data.

    Args:
        classes: by source, settings of its head that hold numbers of classes, as keys and values.
        class_names: by source and kind of class, the names in order of their index.
    """
    description: dict[str, Any] = {"config": cfg.dump(sort_keys=False), "tasks": [_plain_task(task) for task in tasks]}
    description["classes"] = {source: list(counts) for source, counts in (classes or {}).items()}
    description["class_names"] = {source: dict(names) for source, names in (class_names or {}).items()}
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_atomically({"model": state, "xlearner": description}, path)


def _plain_task(task: TaskSpec) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(task).items()}
