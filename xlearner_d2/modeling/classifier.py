"""Image classification as a Detectron2 meta-architecture, so that a classifier is a head like any other."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from .pixels import normalise


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Global average pooling and one linear layer over a stage of the backbone.

    Args:
        backbone: a Detectron2 backbone that offers ``in_feature``.
        in_feature: the stage to pool.
        num_classes: size of the label space.
        pixel_mean, pixel_std: per-channel normalisation, in the order and range of the input images.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: strengths of timm's mixup and cutmix; 0 turns each off. Both need batches of even size.
        dropout: probability of dropping a pooled feature while training.
        multi_label: an image has any number of classes, each a yes or no of its own; labels are then not smoothed.

    Raises:
        ValueError: for an unknown ``in_feature``, and for mixup or cutmix with ``multi_label``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        num_classes: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        dropout: float = 0.0,
        multi_label: bool = False,
    ):
        super().__init__()
        if multi_label and (mixup or cutmix):
            raise ValueError("MODEL.CLASSIFIER.MULTI_LABEL cannot be combined with MIXUP or CUTMIX.")
        shapes = backbone.output_shape()
        if in_feature not in shapes:
            raise ValueError(f"MODEL.CLASSIFIER.IN_FEATURE is {in_feature!r}, but the backbone offers {list(shapes)}.")
        self.backbone = backbone
        self.in_feature = in_feature
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(shapes[in_feature].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(
                mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes
            )
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = cfg.MODEL.CLASSIFIER
        return {
            "backbone": build_backbone(cfg),
            "in_feature": options.IN_FEATURE,
            "num_classes": options.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "label_smoothing": options.LABEL_SMOOTHING,
            "mixup": options.MIXUP,
            "cutmix": options.CUTMIX,
            "dropout": options.DROPOUT,
            "multi_label": options.MULTI_LABEL,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Loss in training, probabilities otherwise.

        Args:
            batched_inputs: each with ``image`` (C, H, W) and, in training, ``category_id``, the class index, or
                ``category_ids``, the indices of all its classes, if it may have several.

        Returns:
            ``{"loss_cls": scalar}`` in training; else, for each image, ``{"scores": (num_classes,)}``, which sum to
            one, or ``{"label_scores": (num_classes,)}``, each a probability, if it may have several.
        """
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        batch = ImageList.from_tensors(normalise(images, self.pixel_mean, self.pixel_std)).tensor.flatten(0, -4)
        if not self.training:
            logits = self._logits(batch).float()
            if self.multi_label:
                return [{"label_scores": scores} for scores in logits.sigmoid()]
            return [{"scores": scores} for scores in logits.softmax(dim=1)]
        loss = self._multi_label_loss if self.multi_label else self._single_label_loss
        return {"loss_cls": loss(batch, batched_inputs)}

    def _single_label_loss(self, batch: Tensor, batched_inputs: list[dict[str, Any]]) -> Tensor:
        labels = torch.tensor([x["category_id"] for x in batched_inputs]).to(self.device, non_blocking=True)
        smoothing = self.label_smoothing
        if self.mixup is not None:
            batch, labels = self.mixup(batch, labels)  # labels are now (N, num_classes), smoothed
            smoothing = 0.0
        return F.cross_entropy(self._logits(batch).float(), labels, label_smoothing=smoothing)

    def _multi_label_loss(self, batch: Tensor, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Binary cross-entropy, the mean over images and classes."""
        targets = torch.zeros(len(batched_inputs), self.num_classes, device=self.device)
        for target, x in zip(targets, batched_inputs, strict=True):
            target[x["category_ids"]] = 1.0
        return F.binary_cross_entropy_with_logits(self._logits(batch).float(), targets)

    def _logits(self, images: Tensor) -> Tensor:
        features = self.backbone(images)[self.in_feature]  # (N, C, H, W)
        return self.linear(self.dropout(features.mean(dim=(2, 3))))
