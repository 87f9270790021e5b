"""A student's file, read back as the network that it describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint.load import load_resnet, read_checkpoint
from ..modeling.branches import Branch, build_branch, network_name
from ..modeling.expanded import STAGES
from ..specs import ConfigError


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained student, in inference mode.

    Attributes:
        path: its file.
        network: returns features of normalised images (N, 3, H, W) by stage, ``res2`` to ``res5``.
        cfg: Detectron2's config with its network, ``MODEL.RESNETS`` or ``MODEL.BACKBONE.TIMM``, and input convention.
        training: how it was made, as its file tells: sources, steps, command, commit; empty if the file does not.
    """

    path: Path
    network: Branch
    cfg: CfgNode
    training: Mapping[str, Any]

    @property
    def depth(self) -> int:
        """Of a ResNet; 0 for another network."""
        return 0 if self.timm else int(self.cfg.MODEL.RESNETS.DEPTH)

    @property
    def timm(self) -> str:
        """Its name in timm; "" for Detectron2's ResNet."""
        return str(self.cfg.MODEL.BACKBONE.TIMM)

    @property
    def name(self) -> str:
        return network_name(self.cfg)

    def normalised(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), 0 to 255, in the student's channel order, as the network takes them."""
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD)
        )
        return (images - mean) / std

    @torch.no_grad()
    def features(self, rgb: Tensor) -> dict[str, Tensor]:
        """Features of RGB images (N, 3, H, W), 0 to 255, by stage."""
        images = rgb.flip(1) if self.cfg.INPUT.FORMAT == "BGR" else rgb
        return dict(self.network(self.normalised(images)))


def load_student(path: str | Path) -> Student:
    """Read a file that the squeeze stage has exported.

    Raises:
        ConfigError: when it is no such file, or its weights are not those of the network that it describes.
    """
    content = read_checkpoint(path)
    description = content.get("xlearner", {})
    if not {"resnets", "input"} <= set(description):
        what = "a student, such as student_d2.pth of a finished run, is expected"
        raise ConfigError([f"{path} does not say what network it holds: {what}."], what="The file of weights")
    cfg = _config(description)
    network = build_branch(cfg, out_features=STAGES)
    load_resnet(network, path)
    return Student(path=Path(path), network=network.eval(), cfg=cfg, training=description.get("training", {}))


def _config(description: Mapping[str, Any]) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 0
    for key, value in description["resnets"].items():
        cfg.MODEL.RESNETS[key] = value
    if "SyncBN" in cfg.MODEL.RESNETS.NORM:  # of three kinds; the same map in inference, and it runs on a CPU
        cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.TIMM = description.get("timm", "")  # files of before have none
    cfg.INPUT.FORMAT = description["input"]["format"]
    cfg.MODEL.PIXEL_MEAN = list(description["input"]["pixel_mean"])
    cfg.MODEL.PIXEL_STD = list(description["input"]["pixel_std"])
    return cfg


def norm_kind(network: nn.Module) -> str:
    """What normalises the features: "live BN" (statistics move in training), "frozen BN", or another layer's name."""
    for module in network.modules():
        name = type(module).__name__
        if name.startswith("Frozen"):
            return "frozen BN"
        if isinstance(module, _BatchNorm):
            return "live BN"
        # Of a convolution with its norm, the norm comes later.
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) or ("Norm" in name and not [*module.children()]):
            return name
    return "none"
