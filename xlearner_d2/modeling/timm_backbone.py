"""Any convolutional network of timm, cut into the stages of a ResNet, as a Detectron2 backbone.

    MODEL.BACKBONE.NAME build_timm_fpn_backbone  MODEL.BACKBONE.TIMM convnext_tiny

timm's own ``features_only`` decides which of a network's modules run one after another, so that a stage can be run
alone and something be added to what it gives; networks that timm can only run as a whole are refused.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from timm.layers import convert_sync_batchnorm
from timm.models import FeatureDictNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..specs import ConfigError, nearest
from .necks import make_fpn, make_retinanet_fpn

STAGES = ("res2", "res3", "res4", "res5")
#: Detectron2's ways to build a backbone around its ResNet -> the same around a network of timm.
TIMM_BUILDERS = {
    "build_resnet_backbone": "build_timm_backbone",
    "build_resnet_fpn_backbone": "build_timm_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_timm_retinanet_fpn_backbone",
}


class _Part(nn.Sequential):
    """Modules that run one after another and divide the image's sides by ``stride``, rounding up as a ResNet does.

    Where a side is no multiple, zeros are added; for convolutions that pad with zeros themselves, this changes nothing.
    """

    def __init__(self, modules: Mapping[str, nn.Module], stride: int):
        super().__init__(OrderedDict(modules))
        self.stride = stride

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        below, right = (-input.shape[2] % self.stride, -input.shape[3] % self.stride)
        # A graph that is recorded at one size keeps what was decided there, so it pads always, if by nothing.
        if torch.jit.is_tracing() or torch.compiler.is_exporting() or below or right:
            input = F.pad(input, (0, right, 0, below))
        return super().forward(input)


class TimmBackbone(Backbone):
    """A network of timm with the parts of Detectron2's ResNet: ``stem``, ``res2``, …, ``res5``, at strides 4 to 32.

    Args:
        name: of the model in timm; its weights are random.
        out_features: stages to return; those after the deepest one are left out.
        in_channels: of an image.
        res5_dilation: 2 for a res5 that keeps stride 16, of the networks that timm can dilate.

    Attributes:
        pixel_mean, pixel_std: of RGB images from 0 to 255, as timm's pre-trained weights of this model expect them.

    Raises:
        ValueError: when timm has no such model, or it does not have these parts.
    """

    def __init__(self, *, name: str, out_features: Sequence[str], in_channels: int = 3, res5_dilation: int = 1):
        super().__init__()
        net = _features(name, in_channels, res5_dilation)
        deepest = max(out_features)
        self.timm_name = name
        self.stage_names = tuple(stage for stage in STAGES if stage <= deepest)
        parts = _cut(net, name)
        for part in ("stem", *self.stage_names):
            self.add_module(part, parts[part])
        self.stages = [parts[stage] for stage in self.stage_names]
        self._out_features = list(out_features)
        info = dict(zip(STAGES, net.feature_info.get_dicts()[-len(STAGES) :], strict=True))
        self._out_feature_channels = {stage: info[stage]["num_chs"] for stage in self.stage_names}
        self._out_feature_strides = {stage: info[stage]["reduction"] for stage in self.stage_names}
        expects = timm.get_pretrained_cfg(name, allow_unregistered=True)
        self.pixel_mean = tuple(255 * value for value in expects.mean)
        self.pixel_std = tuple(255 * value for value in expects.std)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of normalised images (N, 3, H, W), by stage."""
        outputs: dict[str, Tensor] = {}
        x = self.stem(images)
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> "TimmBackbone":
        """As ``ResNet.freeze``: 1 freezes the stem, 5 everything up to res5."""
        for part in ("stem", *self.stage_names)[:freeze_at]:
            freeze_batch_norm_2d(getattr(self, part).requires_grad_(False))
        return self

    def timm_names(self) -> dict[str, str]:
        """Under which name timm's whole model has each tensor of this one's state dict."""
        with torch.device("meta"):
            whole = timm.create_model(self.timm_name).state_dict()
        flat = {_flat(name): name for name in whole} | {name: name for name in whole}
        return {name: flat[name.partition(".")[2]] for name in self.state_dict()}


def _flat(name: str) -> str:
    """``stages.0.…`` as ``stages_0.…``: timm flattens two levels of a model into one of its features."""
    return name.replace(".", "_", 1)


def _features(name: str, in_channels: int, res5_dilation: int) -> Any:
    """timm's feature extractor of a model, with random weights.

    Raises:
        ValueError: when timm does not have it, or cannot run it stage by stage.
    """
    if not name or not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}.{nearest(name, timm.list_models())}")
    dilated = {"output_stride": 16} if res5_dilation == 2 else {}
    try:
        net = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels, **dilated)
    except Exception as error:  # each of timm's models refuses in its own way
        wish = "timm cannot make it give features" + (" with a dilated res5 (RES5_DILATION 2)" if dilated else "")
        raise ValueError(f"{wish}: {error}") from error
    if not isinstance(net, FeatureDictNet | EfficientNetFeatures | MobileNetV3Features):
        raise ValueError("timm can run it only as a whole, but a network that runs stage by stage is expected.")
    if str(getattr(net, "output_fmt", "NCHW")) not in ("NCHW", "Format.NCHW"):
        raise ValueError("its features have their channels last (NHWC), but those of convolutions (NCHW) are expected.")
    strides, wanted = net.feature_info.reduction()[-len(STAGES) :], [4, 8, 16, 32 // res5_dilation]
    if strides != wanted:
        raise ValueError(f"its stages have the strides {strides}, but {wanted} are expected.")
    return net


def _steps(net: Any) -> list[tuple[str, nn.Module]]:
    """The modules that run one after another."""
    if isinstance(net, FeatureDictNet):
        return list(net.items())
    before = [(name, child) for name, child in net.named_children() if name != "blocks"]
    return [*before, *((f"blocks_{number}", block) for number, block in net.blocks.named_children())]


def _cut(net: Any, name: str) -> dict[str, nn.Module]:
    """The stem and the stages; the stem ends at stride 2 where timm knows such features, else before res2's modules."""
    steps = _steps(net)
    index = {step: number for number, (step, _) in enumerate(steps)}
    *before, res2, res3, res4, res5 = net.feature_info.get_dicts()
    ends = [index[info["module"].replace(".", "_")] + 1 for info in (res2, res3, res4, res5)]
    halves = [info for info in before if info["reduction"] == 2]
    stem_end = index[halves[-1]["module"].replace(".", "_")] + 1 if halves else ends[0] - 1
    strides = [2 if halves else 4, *(info["reduction"] for info in (res2, res3, res4, res5))]
    bounds = [0, stem_end, *ends]
    parts: dict[str, nn.Module] = {}
    for number, part in enumerate(("stem", *STAGES)):
        factor = strides[number] // (strides[number - 1] if number else 1)
        parts[part] = _Part(dict(steps[bounds[number] : bounds[number + 1]]), factor)
    return parts


@lru_cache
def timm_problem(name: str, *, res5_dilation: int = 1) -> str:
    """Why a model of timm cannot be a branch or student; "" if it can. Takes no memory and hardly any time."""
    side = 76  # no multiple of 32, and 5 rounds up to 3
    try:
        with torch.device("meta"):
            net = TimmBackbone(name=name, out_features=STAGES, res5_dilation=res5_dilation).eval()
            found = {stage: tuple(x.shape[1:]) for stage, x in net(torch.empty(1, 3, side, side)).items()}
    except Exception as error:  # whatever a network of fixed size raises
        return str(error)
    wanted = {s: (of.channels, -(-side // of.stride), -(-side // of.stride)) for s, of in net.output_shape().items()}
    return "" if found == wanted else f"images of {side} pixels give it features {found}, but {wanted} are expected."


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model ``MODEL.BACKBONE.TIMM`` where a plain ResNet would stand.

    ``MODEL.RESNETS.OUT_FEATURES``, ``RES5_DILATION`` and ``MODEL.BACKBONE.FREEZE_AT`` are honoured. A model keeps the
    norm it has, but the BN in it is frozen or synchronised if ``MODEL.RESNETS.NORM`` is "FrozenBN" or "SyncBN".

    Raises:
        ConfigError: when timm has no such model, or it cannot stand for a ResNet.
    """
    resnets = cfg.MODEL.RESNETS
    try:
        backbone = TimmBackbone(
            name=cfg.MODEL.BACKBONE.TIMM,
            out_features=resnets.OUT_FEATURES,
            in_channels=input_shape.channels,
            res5_dilation=resnets.RES5_DILATION,
        )
    except ValueError as error:
        raise ConfigError([f"MODEL.BACKBONE.TIMM is {cfg.MODEL.BACKBONE.TIMM!r}: {error}"]) from error
    if resnets.NORM == "FrozenBN":
        backbone = freeze_batch_norm_2d(backbone)
    elif resnets.NORM in ("SyncBN", "nnSyncBN"):
        backbone = convert_sync_batchnorm(backbone)
    return backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN over the model, where ``build_resnet_fpn_backbone`` would stand."""
    return make_fpn(cfg, build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_timm_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN with P6 and P7 over the model, where ``build_retinanet_resnet_fpn_backbone`` would stand."""
    return make_retinanet_fpn(cfg, build_timm_backbone(cfg, input_shape))
