"""A linear semantic segmentation head: what a frozen backbone's features tell about each pixel by themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F


@SEM_SEG_HEADS_REGISTRY.register()
class LinearSemSegHead(nn.Module):
    """One linear classifier over the features of all stages at a pixel, each standardised over the data.

    A linear map of features that are upsampled and stacked is the sum of linear maps of each, upsampled afterwards,
    which is what is computed.

    Args:
        input_shape: stages to read.
        num_classes: of the data set.
        ignore_value: label without a loss.
        common_stride: resolution of the logits, before they are upsampled to that of the image.

    Raises:
        ValueError: when a stage has a smaller stride than that.
    """

    @configurable
    def __init__(
        self, *, input_shape: Mapping[str, ShapeSpec], num_classes: int, ignore_value: int = 255, common_stride: int = 4
    ):
        super().__init__()
        self.strides = {name: int(shape.stride or 1) for name, shape in input_shape.items()}
        fine = {name: stride for name, stride in self.strides.items() if stride < common_stride}
        if fine:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {common_stride}, but its IN_FEATURES: {fine}.")
        self.ignore_value = ignore_value
        self.common_stride = common_stride
        self.norms = nn.ModuleDict(
            {name: nn.BatchNorm2d(shape.channels, affine=False) for name, shape in input_shape.items()}
        )
        self.classifiers = nn.ModuleDict(
            {name: nn.Conv2d(shape.channels, num_classes, kernel_size=1) for name, shape in input_shape.items()}
        )
        for parameter in self.classifiers.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "common_stride": head.COMMON_STRIDE,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """As Detectron2's heads: ``(None, losses)`` in training, ``(logits (N, classes, H, W), {})`` otherwise.

        The logits of an image whose sides ``common_stride`` does not divide exceed it at the lower and right edges.

        Args:
            features: (N, C, H / stride, W / stride) by stage, rounded up.
            targets: (N, H, W) class indices.
        """
        logits = upsample(self._sum(features), self.common_stride)
        if not self.training:
            return logits, {}
        assert targets is not None
        logits = logits[..., : targets.shape[-2], : targets.shape[-1]]
        loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=self.ignore_value)
        # Not the mean, which is NaN where no pixel has a label.
        return None, {"loss_sem_seg": loss / (targets != self.ignore_value).sum().clamp(min=1)}

    def _sum(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits at the common stride."""
        parts = [
            upsample(classifier(self.norms[name](features[name])), self.strides[name] / self.common_stride)
            for name, classifier in self.classifiers.items()
        ]
        # Rounded up, the coarser a stage the more its map exceeds the image.
        height, width = (min(part.shape[axis] for part in parts) for axis in (-2, -1))
        return torch.stack([part[..., :height, :width] for part in parts]).sum(dim=0)


#: Side of the larger map up to which products are faster on a CPU: 0.65 of the time at 96 pixels, 0.96 at 256, 1.1 at
#: 512 (docs/SPEED.md), as their arithmetic grows with the side.
LARGEST_PRODUCT = 256


def upsample(maps: Tensor, factor: float) -> Tensor:
    """Bilinear upsampling, as ``F.interpolate`` does it without ``align_corners``, in float32.

    Small maps are multiplied on a CPU: by a matrix for the columns and one for the rows.

    Args:
        maps: (N, C, H, W).
        factor: of both sides, which are rounded down.
    """

    def weights(size: int) -> Tensor:
        """(size, size * factor), the part of each pixel in each of the larger map."""
        return F.interpolate(torch.eye(size)[None], scale_factor=factor, mode="linear", align_corners=False)[0]

    if factor == 1:
        return maps.float()
    height, width = maps.shape[-2:]
    if maps.device.type != "cpu" or factor * max(height, width) > LARGEST_PRODUCT:
        return F.interpolate(maps.float(), scale_factor=factor, mode="bilinear", align_corners=False)
    with torch.autocast("cpu", enabled=False):
        return weights(height).T @ (maps.float() @ weights(width))
