"""What a network expects of its pixels, and the exact conversion of a stem from one convention to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor


@dataclass(frozen=True)
class PixelConvention:
    """Order and normalisation of the channels of an image with values from 0 to 255.

    Attributes:
        format: as ``INPUT.FORMAT``.
        mean, std: as ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``, in the order of ``format``; None where not known.
    """

    format: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, cfg: CfgNode) -> "PixelConvention":
        """That of a config."""
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    @classmethod
    def stored(cls, record: Mapping[str, Any]) -> "PixelConvention":
        """That of a student's file, see :func:`.export.input_convention`."""
        return cls(record["format"], tuple(record["pixel_mean"]), tuple(record["pixel_std"]))

    @property
    def flipped(self) -> "PixelConvention":
        """The same with its channels in opposite order."""
        mean, std = (None if of is None else tuple(reversed(of)) for of in (self.mean, self.std))
        return PixelConvention(self.format[::-1], mean, std)


#: What torchvision's weights and most of timm's expect.
IMAGENET = PixelConvention("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
#: What Caffe2's weights expect; those of ResNets go with a std of 1, but X-101-32x8d with ImageNet's.
CAFFE2 = PixelConvention("BGR")


@dataclass(frozen=True)
class StemConversion:
    """How the weights that read an image are converted.

    Attributes:
        flip: reverse their input channels.
        scale: factor on each input channel, in the new order; empty for none.
        problem: what cannot be converted, as a sentence; "" for nothing.
    """

    flip: bool = False
    scale: tuple[float, ...] = ()
    problem: str = ""

    def __call__(self, weight: Tensor) -> Tensor:
        """Convert weights (C_out, C_in, H, W)."""
        weight = weight.flip(1) if self.flip else weight
        return weight * torch.tensor(self.scale).view(1, -1, 1, 1) if self.scale else weight

    def __str__(self) -> str:
        words = ["channels reversed"] if self.flip else []
        words += ["scaled to MODEL.PIXEL_STD"] if self.scale else []
        return " and ".join(words)


def stem_conversion(made_for: PixelConvention, used_with: PixelConvention) -> StemConversion:
    """What makes weights for one convention give the same features with another.

    A different order and std can be converted exactly: a convolution is linear in each channel. A different mean cannot
    be, as it shifts the images but not the zeros around them.
    """
    flip = made_for.format != used_with.format
    made_for = made_for.flipped if flip else made_for
    if made_for.format != used_with.format:
        got = f"INPUT.FORMAT is {used_with.format!r}, but the file is for {made_for.format!r} or its reverse"
        return StemConversion(problem=f"{got}, so its stem is taken as it is.")
    scale = tuple(new / old for new, old in zip(used_with.std or (), made_for.std or (), strict=False))
    if _close(scale, (1.0,) * len(scale)):
        scale = ()
    if made_for.mean is None or used_with.mean is None or _close(made_for.mean, used_with.mean):
        return StemConversion(flip, scale)
    wish = f"MODEL.PIXEL_MEAN is {list(used_with.mean)}, but the file is for {_round(made_for.mean)}"
    return StemConversion(flip, scale, f"{wish}, which no conversion of weights makes up for: set it to that.")


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= 1e-5 * max(abs(a), abs(b)) for a, b in zip(first, second, strict=True))


def _round(values: tuple[float, ...]) -> list[float]:
    return [round(value, 3) for value in values]
