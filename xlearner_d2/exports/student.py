"""A student's file, read back as the ResNet that it describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from ..checkpoint.load import load_resnet, read_checkpoint
from ..modeling.expanded import STAGES, build_branch
from ..specs import ConfigError


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained student, in inference mode.

    Attributes:
        path: its file.
        resnet: returns features of normalised images (N, 3, H, W) by stage, ``res2`` to ``res5``.
        cfg: Detectron2's config with its ``MODEL.RESNETS`` and input convention.
        training: how it was made, as its file tells: sources, steps, command, commit; empty if the file does not.
    """

    path: Path
    resnet: ResNet
    cfg: CfgNode
    training: Mapping[str, Any]

    @property
    def depth(self) -> int:
        return int(self.cfg.MODEL.RESNETS.DEPTH)

    def normalised(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), 0 to 255, in the student's channel order, as the ResNet takes them."""
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD)
        )
        return (images - mean) / std

    @torch.no_grad()
    def features(self, rgb: Tensor) -> dict[str, Tensor]:
        """Features of RGB images (N, 3, H, W), 0 to 255, by stage."""
        images = rgb.flip(1) if self.cfg.INPUT.FORMAT == "BGR" else rgb
        return dict(self.resnet(self.normalised(images)))


def load_student(path: str | Path) -> Student:
    """Read a file that the squeeze stage has exported.

    Raises:
        ConfigError: when it is no such file, or its weights are not those of the ResNet that it describes.
    """
    content = read_checkpoint(path)
    description = content.get("xlearner", {})
    if not {"resnets", "input"} <= set(description):
        what = "a student, such as student_d2.pth of a finished run, is expected"
        raise ConfigError([f"{path} does not say what network it holds: {what}."], what="The weights")
    cfg = _config(description)
    resnet = build_branch(cfg, out_features=STAGES)
    load_resnet(resnet, path)
    return Student(path=Path(path), resnet=resnet.eval(), cfg=cfg, training=description.get("training", {}))


def _config(description: Mapping[str, Any]) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 0
    for key, value in description["resnets"].items():
        cfg.MODEL.RESNETS[key] = value
    if cfg.MODEL.RESNETS.NORM == "SyncBN":  # the same map in inference, and it runs on a CPU
        cfg.MODEL.RESNETS.NORM = "BN"
    cfg.INPUT.FORMAT = description["input"]["format"]
    cfg.MODEL.PIXEL_MEAN = list(description["input"]["pixel_mean"])
    cfg.MODEL.PIXEL_STD = list(description["input"]["pixel_std"])
    return cfg


def norm_kind(module: nn.Module) -> str:
    """What normalises the features: "live BN" (statistics move in training), "frozen BN", or another layer's name."""
    norm = getattr(module, "norm", None)
    name = type(norm).__name__
    return {"BatchNorm2d": "live BN", "FrozenBatchNorm2d": "frozen BN"}.get(name, name)
