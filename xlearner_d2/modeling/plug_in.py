"""A trained branch of the expanded backbone as the backbone of any Detectron2 config.

    MODEL.BACKBONE.NAME build_xlearner_fpn_backbone
    XLEARNER.PLUG_IN.WEIGHTS output/openmoji/expanded.pth  XLEARNER.PLUG_IN.TASK detection
    MODEL.WEIGHTS ""

The config needs the keys of :func:`xlearner_d2.add_xlearner_config`; everything else of it stays as it is.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import Tensor

from ..checkpoint.load import load_strictly, read_checkpoint, with_own_counters
from ..checkpoint.stored import PIXEL_KEYS, check_convention, stored_config
from ..settings import add_xlearner_config
from ..specs import ConfigError, TaskSpec, nearest
from .branches import freeze_norm
from .expanded import STAGES, ExpandedBackbone, build_expanded_backbone
from .necks import make_fpn, make_retinanet_fpn

#: Where the configs of the model zoo start from, unless told otherwise.
_BACKBONES_OF_THE_ZOO = "detectron2://ImageNetPretrained/"


class ExpandedBranch(Backbone):
    """One task's branch with the auxiliary branches that it listens to.

    Args:
        backbone: as trained; what ``out_features`` do not need of it is dropped.
        task: whose branch.
        out_features: stages to return.
    """

    def __init__(self, *, backbone: ExpandedBackbone, task: str, out_features: Sequence[str]):
        super().__init__()
        shapes = backbone.output_shape(task)
        missing = [name for name in out_features if name not in shapes]
        if missing:
            has = f"branch {task!r} has {list(shapes)}"
            raise ConfigError([f"MODEL.RESNETS.OUT_FEATURES asks for {missing}, but {has}."])
        self.backbone = backbone.only(task, deepest=max(out_features))
        self.task = task
        self._out_features = list(out_features)
        self._out_feature_channels = {name: shapes[name].channels for name in out_features}
        self._out_feature_strides = {name: shapes[name].stride for name in out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of normalised images (N, 3, H, W), by stage."""
        features = self.backbone(x, self.task)
        return {name: features[name] for name in self._out_features}

    def freeze(self, freeze_at: int) -> "ExpandedBranch":
        """As ``ResNet.freeze``: 1 freezes the stem, 5 everything up to res5, with what other branches send there."""
        own = self.backbone.branch_of[self.task]
        self.backbone.branch(own).freeze(freeze_at)
        reconcile = self.backbone.incoming(own)
        if reconcile is not None:
            for stage in STAGES[: max(freeze_at - 1, 0)]:
                reconcile.freeze(stage)
        if freeze_at > len(STAGES):  # all is frozen that listens, so nothing trains the auxiliary branches either
            self.requires_grad_(False)
            self.freeze_norm()
        return self

    def freeze_norm(self) -> None:
        """Turn all BN into frozen BN."""
        freeze_norm(self)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self.backbone.reconciliation)


def load_expanded_backbone(path: str, *, used_by: CfgNode | None = None) -> ExpandedBackbone:
    """Build the backbone of an expanded checkpoint from the description in the file, and load it strictly.

    Args:
        used_by: config of the model that gives it images, if there is one: they have to be as the backbone knows them.

    Raises:
        ConfigError: when the file is no expanded checkpoint, or was trained with other pixels.
    """
    checkpoint = read_checkpoint(path)
    if "tasks" not in checkpoint.get("xlearner", {}):
        raise ConfigError([f"{path} is no expanded checkpoint; one is called expanded.pth in the output of expand."])
    if used_by is not None:
        check_convention(used_by, checkpoint, path, PIXEL_KEYS)
    stored = stored_config(checkpoint)
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.MODEL.PIXEL_MEAN = stored["MODEL"]["PIXEL_MEAN"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.BACKBONE.TIMM = stored["MODEL"]["BACKBONE"].get("TIMM", "")  # files of before have none
    cfg.XLEARNER.BRANCHES = CfgNode(stored["XLEARNER"].get("BRANCHES", {}))
    cfg.MODEL.RESNETS.merge_from_other_cfg(CfgNode(stored["MODEL"]["RESNETS"]))
    for key in ("SHARING", "RECONCILIATION", "CHANNELS_LAST"):
        cfg.XLEARNER.merge_from_other_cfg(CfgNode({key: stored["XLEARNER"][key]}))
    tasks = [TaskSpec(**_tuples(task)) for task in checkpoint["xlearner"]["tasks"]]
    backbone = build_expanded_backbone(cfg, tasks)
    prefix = "backbone."
    state = {name.removeprefix(prefix): v for name, v in checkpoint["model"].items() if name.startswith(prefix)}
    load_strictly(backbone, with_own_counters(backbone, state), path=path)
    return backbone


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}


def expanded_branch(
    path: str, task: str, *, out_features: Sequence[str], used_by: CfgNode | None = None, where: str = ""
) -> ExpandedBranch:
    """The branch of ``task`` from an expanded checkpoint.

    Args:
        used_by: see :func:`load_expanded_backbone`.
        where: start of the message about an unknown task, such as the setting that names it.

    Raises:
        ConfigError: when the file is no expanded checkpoint, was trained with other pixels, or has no such task or
            features.
    """
    backbone = load_expanded_backbone(path, used_by=used_by)
    if task not in backbone.tasks:
        raise ConfigError([f"{where}{task!r} is no task of {path}.{nearest(task, backbone.tasks)}"])
    return ExpandedBranch(backbone=backbone, task=task, out_features=out_features)


@BACKBONE_REGISTRY.register()
def build_xlearner_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ExpandedBranch:
    """The branch ``XLEARNER.PLUG_IN.TASK`` of ``XLEARNER.PLUG_IN.WEIGHTS``, where a plain ResNet would stand.

    ``MODEL.RESNETS.OUT_FEATURES``, ``MODEL.BACKBONE.FREEZE_AT`` and a frozen ``MODEL.RESNETS.NORM`` are honoured.

    Raises:
        ConfigError: see :func:`expanded_branch`; also where ``MODEL.WEIGHTS`` is a ResNet of the model zoo.
    """
    options = cfg.XLEARNER.PLUG_IN
    if cfg.MODEL.WEIGHTS.startswith(_BACKBONES_OF_THE_ZOO):
        wish = "set it to '' (or to a checkpoint of this very model)"
        raise ConfigError([f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, which would be loaded over the branch: {wish}."])
    features = cfg.MODEL.RESNETS.OUT_FEATURES
    where = "XLEARNER.PLUG_IN.TASK: "
    branch = expanded_branch(options.WEIGHTS, options.TASK, out_features=features, used_by=cfg, where=where)
    branch.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        branch.freeze_norm()
    return branch


@BACKBONE_REGISTRY.register()
def build_xlearner_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN over the branch, where ``build_resnet_fpn_backbone`` would stand."""
    return make_fpn(cfg, build_xlearner_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_xlearner_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN with P6 and P7 over the branch, where ``build_retinanet_resnet_fpn_backbone`` would stand."""
    return make_retinanet_fpn(cfg, build_xlearner_backbone(cfg, input_shape))
