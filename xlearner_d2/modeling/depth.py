"""Depth from one image, as a Detectron2 meta-architecture: the example of a new kind in docs/EXTENDING.md."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class DepthEstimator(nn.Module):
    """The layers of Detectron2's semantic FPN head with one output, the logarithm of the depth in metres.

    Args:
        backbone: such as an FPN; offers what ``head`` reads.
        head: with one class.
        pixel_mean, pixel_std: per-channel normalisation, in the order and range of the input images.
        depth_range: nearest and farthest distance in metres; others give no loss and are not predicted.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: SemSegFPNHead,
        pixel_mean: list[float],
        pixel_std: list[float],
        depth_range: tuple[float, float] = (0.1, 100.0),
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.log_range = (math.log(depth_range[0]), math.log(depth_range[1]))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone, options = build_backbone(cfg), cfg.MODEL.DEPTH_HEAD
        shapes = backbone.output_shape()
        missing = [name for name in options.IN_FEATURES if name not in shapes]
        if missing:
            raise ValueError(f"MODEL.DEPTH_HEAD.IN_FEATURES names {missing}, but the backbone offers {list(shapes)}.")
        head = SemSegFPNHead(
            {name: shapes[name] for name in options.IN_FEATURES},
            num_classes=1,
            conv_dims=options.CONVS_DIM,
            common_stride=options.COMMON_STRIDE,
            norm=options.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "depth_range": tuple(options.RANGE),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Loss in training, depth otherwise.

        Args:
            batched_inputs: each with ``image`` (C, H, W); in training ``depth`` (H, W) in metres, 0 where unknown; in
                inference ``height`` and ``width`` of the result, in pixels.

        Returns:
            ``{"loss_depth": scalar}`` in training; else, for each image, ``{"depth": (height, width)}`` in metres.
        """
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        batch = self._pad(images)
        size = batch.tensor.shape[-2:]
        log_depth = self.head.layers(self.backbone(batch.tensor)).float()  # (N, 1, H / stride, W / stride)
        log_depth = nn.functional.interpolate(log_depth, size=size, mode="bilinear", align_corners=False)
        if self.training:
            depths = self._pad([x["depth"].to(self.device) for x in batched_inputs])
            return {"loss_depth": self._loss(log_depth[:, 0], depths.tensor)}
        results = []
        for found, image_size, x in zip(log_depth, batch.image_sizes, batched_inputs, strict=True):
            height, width = x.get("height", image_size[0]), x.get("width", image_size[1])
            own = sem_seg_postprocess(found.clamp(*self.log_range), image_size, height, width)[0]
            results.append({"depth": own.exp()})
        return results

    def _pad(self, maps: list[Tensor]) -> ImageList:
        """To one size, with zeros: the normalised mean of images, an unknown depth."""
        divisibility, constraints = self.backbone.size_divisibility, self.backbone.padding_constraints
        return ImageList.from_tensors(maps, divisibility, padding_constraints=constraints)

    def _loss(self, log_depth: Tensor, depth: Tensor) -> Tensor:
        """Mean absolute difference of the logarithms over pixels (N, H, W) of known depth; 0 where there is none."""
        wanted = depth.clamp(min=1e-6).log()
        low, high = self.log_range
        known = (wanted >= low) & (wanted <= high)
        return torch.where(known, (log_depth - wanted).abs(), 0.0).sum() / known.sum().clamp(min=1)
