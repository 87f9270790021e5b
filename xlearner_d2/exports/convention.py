"""What a file's network is to be fed: channel order, range and normalisation of images, and facts of its layers."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pixels import IMAGENET, PixelConvention
from .student import Student, norm_kind


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How an image becomes input: ``(image in channel_order, 0 to value_range, - mean) / std``.

    Attributes:
        channel_order: "RGB" or "BGR".
        value_range: 1.0 or 255.0, the largest value of a pixel.
        mean, std: per channel, in that order and range.
        normalised_inside: the network does so itself, and takes images from 0 to ``value_range``.
        stride_in: which convolution of a bottleneck has the stride: "1x1", "3x3", or "" for a network without them.
        norm: "live BN", "frozen BN", or the name of another layer.
    """

    channel_order: str
    value_range: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalised_inside: bool
    stride_in: str
    norm: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _facts(student: Student) -> dict[str, str]:
    in_1x1 = student.cfg.MODEL.RESNETS.STRIDE_IN_1X1
    stride_in = "" if student.depth < 50 else "1x1" if in_1x1 else "3x3"
    return {"stride_in": stride_in, "norm": norm_kind(student.network)}


def own_convention(student: Student) -> Convention:
    """The student's own, as in the config that it was trained with."""
    model = student.cfg.MODEL
    return Convention(
        channel_order=student.cfg.INPUT.FORMAT,
        value_range=255.0,
        mean=tuple(model.PIXEL_MEAN),
        std=tuple(model.PIXEL_STD),
        normalised_inside=False,
        **_facts(student),
    )


def image_convention(student: Student) -> Convention:
    """RGB images from 0 to 255, which the network normalises itself."""
    mean, std = _rgb(student)
    return Convention(
        channel_order="RGB", value_range=255.0, mean=mean, std=std, normalised_inside=True, **_facts(student)
    )


def imagenet_convention(student: Student) -> Convention:
    """That of torchvision's and timm's ImageNet models: RGB from 0 to 1, the student's own mean, ImageNet's std.

    The mean is not ImageNet's by definition, as a shift cannot be moved into a convolution that pads with zeros; with
    Detectron2's default ``MODEL.PIXEL_MEAN`` it is.
    """
    mean = tuple(round(value / 255.0, 9) for value in _rgb(student)[0])
    assert IMAGENET.std is not None
    std = tuple(round(value / 255.0, 9) for value in IMAGENET.std)
    return Convention(
        channel_order="RGB", value_range=1.0, mean=mean, std=std, normalised_inside=False, **_facts(student)
    )


def _rgb(student: Student) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the student's pixels, in the order of RGB."""
    model, step = student.cfg.MODEL, -1 if student.cfg.INPUT.FORMAT == "BGR" else 1
    return tuple(model.PIXEL_MEAN[::step]), tuple(model.PIXEL_STD[::step])


def pixels_of(convention: Convention) -> PixelConvention:
    """The same for images from 0 to 255, as stems are converted."""
    scale = 255.0 / convention.value_range
    mean, std = (tuple(scale * value for value in values) for values in (convention.mean, convention.std))
    return PixelConvention(convention.channel_order, mean, std)


def feed(rgb: Tensor, convention: Convention) -> Tensor:
    """RGB images (N, 3, H, W), 0 to 255, in a convention."""
    images = rgb * (convention.value_range / 255.0)
    images = images.flip(1) if convention.channel_order == "BGR" else images
    if convention.normalised_inside:
        return images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (convention.mean, convention.std))
    return (images - mean) / std
