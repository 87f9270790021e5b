"""A student to write, read and compare: every weight and statistic of it matters."""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from xlearner_d2.modeling.branches import Branch, build_branch
from xlearner_d2.modeling.expanded import STAGES


def student_cfg(depth: int = 50, **resnets: Any) -> CfgNode:
    """As Detectron2's model zoo has it, but for trained BN and what ``resnets`` says."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM = "cpu", 0, "BN"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = depth, 64 if depth < 50 else 256
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def make_student(cfg: CfgNode) -> Branch:
    """In inference mode, with BN that is no identity."""
    torch.manual_seed(0)
    student = build_branch(cfg, out_features=STAGES)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.uniform_(-0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return student.eval()
