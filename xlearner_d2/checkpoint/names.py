"""Weights of a backbone in files of several projects, under the names that the backbone has for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor, nn

from .pixels import CAFFE2, IMAGENET, PixelConvention

State = dict[str, Tensor]

_TORCHVISION = (
    (re.compile(r"^conv1\."), "stem.conv1."),
    (re.compile(r"^bn1\."), "stem.conv1.norm."),
    (re.compile(r"^layer(\d)\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\.downsample\.0\."), ".shortcut."),
    (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
    (re.compile(r"\.bn(\d)\."), r".conv\1.norm."),
)


@runtime_checkable
class OfTimm(Protocol):
    """A backbone that is made of a network of timm; see :class:`~xlearner_d2.modeling.timm_backbone.TimmBackbone`."""

    timm_name: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def timm_names(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class BackboneFile:
    """What a file says about a backbone.

    Attributes:
        state: its weights, under the backbone's names; those that the backbone does not have under the file's.
        pixels: what the weights expect; None where neither the file nor its names tell.
        stride_in_1x1: of a bottleneck ResNet, as ``MODEL.RESNETS.STRIDE_IN_1X1``; None where nothing tells.
    """

    state: State
    pixels: PixelConvention | None = None
    stride_in_1x1: bool | None = None


def backbone_file(checkpoint: Mapping[str, Any], backbone: nn.Module) -> BackboneFile:
    """Read the weights for ``backbone`` from a checkpoint's content; without weights if it has none for it."""
    state = checkpoint["model"]
    own = _described(checkpoint, named_within(state, first_name(backbone)))
    if isinstance(backbone, OfTimm):
        return own if own.state else _of_timm(state, backbone)
    if "res2_0_branch2a_w" in state:
        found = resnet_state(state)
        return BackboneFile(found, CAFFE2, _is_plain_bottleneck(found, state) or None)
    if "layer1.0.conv1.weight" in state:
        return BackboneFile(resnet_state(state), IMAGENET, False)
    if own.state and checkpoint.get("__author__") == "torchvision":  # converted by Detectron2's own script
        return BackboneFile(own.state, IMAGENET, False)
    return own


def first_name(backbone: nn.Module) -> str:
    """The name of the first tensor, by which others are found within a model."""
    return next(iter(backbone.state_dict()))


def _described(checkpoint: Mapping[str, Any], state: State) -> BackboneFile:
    """Own names, as this project's students have them: their files say what they expect."""
    description = checkpoint.get("xlearner", {})
    if "input" not in description:
        return BackboneFile(state)
    stride = description.get("resnets", {}).get("STRIDE_IN_1X1")
    return BackboneFile(state, PixelConvention.stored(description["input"]), stride)


def _of_timm(state: Mapping[str, Tensor], backbone: OfTimm) -> BackboneFile:
    own = {theirs: name for name, theirs in backbone.timm_names().items()}
    if not any(name in own for name in state):
        return BackboneFile({})
    pixels = PixelConvention("RGB", backbone.pixel_mean, backbone.pixel_std)
    return BackboneFile({own.get(name, name): value for name, value in state.items()}, pixels)


def _is_plain_bottleneck(state: State, theirs: Mapping[str, Tensor]) -> bool:
    """Caffe2's ResNets have their stride in the 1x1 convolution, but not those with groups or group normalisation."""
    first, second = state["res2.0.conv1.weight"], state["res2.0.conv2.weight"]
    bottleneck = "res2.0.conv3.weight" in state and second.shape[1] == first.shape[0]
    return bottleneck and not any(name.endswith("_gn_s") for name in theirs)


def _from_torchvision(name: str) -> str:
    for pattern, replacement in _TORCHVISION:
        name = pattern.sub(replacement, name)
    return name


def _from_caffe2(state: Mapping[str, Tensor]) -> State:
    names = [name for name in sorted(state) if not name.endswith("_momentum")]
    return dict(zip(convert_basic_c2_names(names), (state[name] for name in names), strict=True))


def named_within(state: Mapping[str, Tensor], first: str) -> State:
    """The weights of the one backbone in a model whose first tensor has this name; empty for none and for several."""
    prefixes = {name.removesuffix(first) for name in state if name.endswith(first)}
    if len(prefixes) != 1:
        return {}
    prefix = prefixes.pop()
    return _stages({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


def _stages(state: Mapping[str, Tensor]) -> State:
    return {name: value for name, value in state.items() if re.match(r"(stem|res\d)\.", name)}


def resnet_state(state: Mapping[str, Tensor]) -> State:
    """The weights of a ResNet under Detectron2's names (``stem.…``, ``res2.…``), without anything else.

    Understands Detectron2's names, alone or within a model; torchvision's and timm's; and Caffe2's (MSRA) names.
    """
    if "res2_0_branch2a_w" in state:
        return _stages(_from_caffe2(state))
    if "layer1.0.conv1.weight" in state:
        return _stages({_from_torchvision(name): value for name, value in state.items()})
    return named_within(state, "stem.conv1.weight")
