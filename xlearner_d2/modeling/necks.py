"""Feature pyramids as Detectron2 builds them, over any backbone with stages res2 to res5."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7


def make_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """An FPN as that of ``build_resnet_fpn_backbone``."""
    return _fpn(cfg, bottom_up, LastLevelMaxPool())


def make_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """An FPN with P6 and P7 as that of ``build_retinanet_resnet_fpn_backbone``."""
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: Any) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
