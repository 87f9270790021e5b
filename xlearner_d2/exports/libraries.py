"""The student as a network of torchvision and of timm: names, stem and checks for what those cannot express."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.modeling.backbone.resnet import BasicBlock
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.feature_extraction import create_feature_extractor

from ..checkpoint.files import replacing, save_atomically
from ..checkpoint.load import convert_stem, is_counter
from ..checkpoint.pixels import PixelConvention, stem_conversion
from ..modeling.timm_backbone import TimmBackbone
from ..specs import ConfigError
from .convention import Convention, imagenet_convention, pixels_of
from .student import Student

_LAYERS = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}


@dataclass(frozen=True)
class _Name:
    """The libraries' names of an architecture, by depth, groups and width of a group."""

    torchvision: str
    timm: str


_NAMES = {
    (18, 1, 64): _Name("resnet18", "resnet18"),
    (34, 1, 64): _Name("resnet34", "resnet34"),
    (50, 1, 64): _Name("resnet50", "resnet50"),
    (101, 1, 64): _Name("resnet101", "resnet101"),
    (152, 1, 64): _Name("resnet152", "resnet152"),
    (50, 32, 4): _Name("resnext50_32x4d", "resnext50_32x4d"),
    (101, 32, 8): _Name("resnext101_32x8d", "resnext101_32x8d"),
    (101, 64, 4): _Name("resnext101_64x4d", "resnext101_64x4d"),
    (50, 1, 128): _Name("wide_resnet50_2", "wide_resnet50_2"),
    (101, 1, 128): _Name("wide_resnet101_2", "wide_resnet101_2"),
}


def architecture(student: Student) -> _Name:
    """A ResNet's architecture in the libraries.

    Raises:
        ConfigError: naming each setting that they have no counterpart for.
    """
    if student.timm:
        what = f"the student is {student.timm} of timm, but a ResNet is expected"
        raise ConfigError([f"{student.path}: {what}."], what="The export to torchvision")
    resnets = student.cfg.MODEL.RESNETS
    key = (resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
    width = 64 if isinstance(student.network.res2[0], BasicBlock) else 256
    problems = []
    if key not in _NAMES:
        problems.append(f"DEPTH, NUM_GROUPS, WIDTH_PER_GROUP are {key}, but one of {sorted(_NAMES)} is expected.")
    if student.depth >= 50 and resnets.STRIDE_IN_1X1:
        why = "these libraries have the stride of a bottleneck in its 3x3 convolution, and no weights make up for that"
        problems.append(f"STRIDE_IN_1X1 is True, but {why}: train with MODEL.RESNETS.STRIDE_IN_1X1 False.")
    wanted = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": width, "RES5_DILATION": 1}
    problems += [
        f"{name} is {resnets[name]}, but {value} is expected."
        for name, value in wanted.items()
        if resnets[name] != value
    ]
    if resnets.NORM not in ("BN", "FrozenBN"):
        problems.append(f"NORM is {resnets.NORM!r}, but batch normalisation is expected.")
    if problems:
        raise ConfigError(
            [f"MODEL.RESNETS.{problem}" for problem in problems], what="The export to torchvision or timm"
        )
    return _NAMES[key]


def library_state(student: Student, convention: Convention) -> dict[str, Tensor]:
    """The weights under the libraries' names, for images in ``convention``; no classifier.

    Raises:
        ConfigError: when the stem cannot be converted to it.
    """
    state = {name: value.detach().clone() for name, value in student.network.state_dict().items()}
    conversion = stem_conversion(PixelConvention.of(student.cfg), pixels_of(convention))
    problems = convert_stem(student.network, state, conversion)[1]
    if problems:
        raise ConfigError([f"{student.path}: {problem}" for problem in problems], what="The export")
    names = student.network.timm_names() if isinstance(student.network, TimmBackbone) else {}
    return {names.get(name) or _name(name): value for name, value in state.items() if not is_counter(name)}


def _name(name: str) -> str:
    """torchvision's name of one of Detectron2's tensors."""
    if name.startswith("stem.conv1."):
        return name.replace("stem.conv1.norm.", "bn1.").replace("stem.conv1.", "conv1.")
    stage, block, layer, *rest = name.split(".")
    layer_name = f"layer{int(stage[3:]) - 1}.{block}"
    if layer == "shortcut":
        return f"{layer_name}.downsample." + (f"1.{rest[1]}" if rest[0] == "norm" else f"0.{rest[0]}")
    number = layer.removeprefix("conv")
    return f"{layer_name}." + (f"bn{number}.{rest[1]}" if rest[0] == "norm" else f"conv{number}.{rest[0]}")


def write_torchvision(student: Student, path: Path) -> Convention:
    """A state dict for ``torchvision.models``, whose ``fc`` is to be replaced; the convention is in the file."""
    architecture(student)
    convention = imagenet_convention(student)
    save_atomically({"state_dict": library_state(student, convention), "convention": convention.as_dict()}, path)
    return convention


def read_torchvision(student: Student, path: Path) -> nn.Module:
    """torchvision's own model with a file's weights, giving features by stage."""
    model = getattr(torchvision_resnet, architecture(student).torchvision)(weights=None)
    model.fc = nn.Identity()
    _load(model, torch.load(path, weights_only=True)["state_dict"])
    return create_feature_extractor(model.eval(), return_nodes=_LAYERS)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    found = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not is_counter(name)]
    unmatched = missing + list(found.unexpected_keys)
    assert unmatched == []


def write_timm(student: Student, folder: Path) -> Convention:
    """A folder as on the Hugging Face hub: ``config.json`` and ``model.safetensors``."""
    convention = imagenet_convention(student)
    name = student.timm or architecture(student).timm
    if (dilation := student.cfg.MODEL.RESNETS.RES5_DILATION) != 1:
        wish = "1 is expected, as that is what timm makes of this name"
        raise ConfigError([f"MODEL.RESNETS.RES5_DILATION is {dilation}, but {wish}."], what="The export to timm")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    state = library_state(student, convention)
    if student.timm:  # what comes after the last stage stays as timm initialises it
        state = model.state_dict() | state
    _load(model, state)
    data = {"mean": convention.mean, "std": convention.std}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=data)
    _describe(folder / "config.json", convention)
    return convention


def _describe(path: Path, convention: Convention) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["convention"] = convention.as_dict()
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Named(nn.Module):
    """Features by stage of a model that returns them as a list."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W)."""
        return dict(zip(_LAYERS.values(), self.model(images)[-len(_LAYERS) :], strict=True))


def read_timm(student: Student, folder: Path) -> nn.Module:
    """timm's own feature extractor, made from a folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    return _Named(model.eval())
