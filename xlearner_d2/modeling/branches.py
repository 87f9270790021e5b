"""What one branch is made of: Detectron2's ResNet or a network of timm, as the config says for its task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from .timm_backbone import STAGES, TIMM_BUILDERS, TimmBackbone, build_timm_backbone

#: A network that is run stage by stage.
Branch: TypeAlias = ResNet | TimmBackbone
#: What Detectron2's ResNet may be deep.
DEPTHS = (18, 34, 50, 101, 152)


#: What a branch is made of; a head's config follows that of its branch in these.
ARCHITECTURE_KEYS = (
    "DEPTH",
    "NUM_GROUPS",
    "NORM",
    "WIDTH_PER_GROUP",
    "STRIDE_IN_1X1",
    "STEM_OUT_CHANNELS",
    "RES2_OUT_CHANNELS",
    "DEFORM_ON_PER_STAGE",
    "DEFORM_MODULATED",
    "DEFORM_NUM_GROUPS",
)
#: ResNets that differ from a branch in their stem and in dilations within res5, which a branch has in its own way.
RESNET_VARIANTS = ("build_resnet_deeplab_backbone",)


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """What is special about the branch of one task.

    Attributes:
        name: the task.
        timm: its network, instead of MODEL.BACKBONE.TIMM.
        depth: 18, 34, 50, 101 or 152, of a ResNet that is otherwise as MODEL.RESNETS says.
        weights: what it starts from, instead of MODEL.WEIGHTS or XLEARNER.EXTEND_INIT: a file of such a network, or
            random.
    """

    name: str
    timm: str = ""
    depth: int = 0
    weights: str = ""


def branch_config(cfg: CfgNode, task: str) -> CfgNode:
    """The project's config with the network of a task's branch in ``MODEL``."""
    record = cfg.XLEARNER.BRANCHES.get(task) or {}
    return with_network(cfg, timm=record.get("TIMM", ""), depth=record.get("DEPTH", 0))


def with_network(cfg: CfgNode, *, timm: str, depth: int) -> CfgNode:
    """The config with a network of timm, or a ResNet of that depth; as it is where neither is given."""
    cfg = cfg.clone()
    cfg.defrost()
    if timm:
        cfg.MODEL.BACKBONE.TIMM = timm
    if depth:
        resnets = cfg.MODEL.RESNETS
        cfg.MODEL.BACKBONE.TIMM = ""
        if depth < 50:  # Detectron2's basic blocks have no other widths
            resnets.RES2_OUT_CHANNELS, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = 64, 1, 64
        elif resnets.DEPTH < 50:
            resnets.RES2_OUT_CHANNELS = 256
        resnets.DEPTH = depth
    return cfg


def timm_model(cfg: CfgNode) -> str:
    """The model of timm that ``MODEL`` describes; "" for a ResNet, as in configs that have Detectron2's keys alone."""
    return str(cfg.MODEL.BACKBONE.get("TIMM", ""))


def network_name(cfg: CfgNode) -> str:
    """What ``MODEL`` describes, in words."""
    resnets = cfg.MODEL.RESNETS
    if timm_model(cfg):
        return timm_model(cfg)
    if resnets.NUM_GROUPS > 1:
        return f"ResNeXt-{resnets.DEPTH} {resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d"
    return f"ResNet-{resnets.DEPTH}"


def follow_network(head: CfgNode, cfg: CfgNode) -> None:
    """Describe in a head's config the network of its branch."""
    for key in ARCHITECTURE_KEYS:
        head.MODEL.RESNETS[key] = cfg.MODEL.RESNETS[key]
    head.MODEL.BACKBONE.TIMM = cfg.MODEL.BACKBONE.TIMM


def has_res5_in_head(head: CfgNode) -> bool:
    """Whether a head has a res5 of its own, which it builds as its config says, over res4 of the branch."""
    return head.MODEL.ROI_HEADS.NAME in ("Res5ROIHeads", "PointRendROIHeadsC4") and _is_two_stage(head)


def stand_on_branch(head: CfgNode, where: str) -> list[str]:
    """Name a backbone that is built as the head's own, but around the network of its branch; problems if none is."""
    if head.MODEL.BACKBONE.NAME in RESNET_VARIANTS:
        head.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    name, network = head.MODEL.BACKBONE.NAME, head.MODEL.BACKBONE.TIMM
    if not network:
        return []
    hint = "give its task a ResNet with XLEARNER.BRANCHES.<task>.DEPTH, the student with XLEARNER.SQUEEZE.DEPTH"
    if name not in TIMM_BUILDERS:
        known = ", ".join(TIMM_BUILDERS)
        return [
            f"{where} has MODEL.BACKBONE.NAME {name!r}, but on {network} of timm one of {known} is expected; {hint}."
        ]
    head.MODEL.BACKBONE.NAME = TIMM_BUILDERS[name]
    if has_res5_in_head(head):
        return [f"{where} has res5 of a ResNet in its head (MODEL.ROI_HEADS.NAME), which {network} has not; {hint}."]
    return []


def _is_two_stage(head: CfgNode) -> bool:
    return head.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")


def build_branch(cfg: CfgNode, *, out_features: Sequence[str], res5_dilation: int = 0) -> Branch:
    """The network that ``cfg.MODEL`` describes, with every stage up to the deepest one asked for.

    Args:
        res5_dilation: instead of ``MODEL.RESNETS.RES5_DILATION``; 0 for that.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.RES5_DILATION = res5_dilation or cfg.MODEL.RESNETS.RES5_DILATION
    deepest = max(out_features)
    cfg.MODEL.RESNETS.OUT_FEATURES = [stage for stage in STAGES if stage <= deepest]
    build = build_timm_backbone if timm_model(cfg) else build_resnet_backbone
    return build(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))


def compile_stages(branch: Branch, *, backend: str) -> None:
    """Compile the stem and each stage, as an expanded model calls them one by one; the names of weights stay.

    Args:
        backend: a name that ``torch.compiler.list_backends(exclude_tags=())`` knows.
    """
    # A graph for each stage, with gradient and without, and for each image size that is met; beyond the limit, which is
    # 8 otherwise, torch goes back to running them as they are.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 128)
    for part in (branch.stem, *branch.stages):
        part.compile(backend=backend)


def freeze_norm(module: nn.Module) -> None:
    """Turn the BN in a module's parts into frozen BN; that of timm may hold an activation, which stays."""
    for child in module.children():
        if isinstance(child, TimmBackbone):
            freeze_batch_norm_2d(child)
        elif isinstance(child, ResNet):
            FrozenBatchNorm2d.convert_frozen_batchnorm(child)
        else:
            freeze_norm(child)
