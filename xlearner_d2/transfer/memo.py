"""Features of a frozen backbone, computed once per image."""

import hashlib
import math

import torch
from detectron2.modeling import Backbone
from torch import Tensor

_PADDING = 32


class MemoisedBackbone(Backbone):
    """A frozen backbone that computes the features of each image once and gives the stored ones from then on.

    An image is known by its normalised, padded pixels, so any augmentation stays correct; what is gained depends on
    how often the very same pixels return. Heads that ask how to pad are told to pad to multiples of 32, as Detectron2's
    FPNs do, or images of many sizes would return with the padding of each batch. The wrapped backbone is no sub-module:
    its mode is left alone.

    Args:
        backbone: frozen, in inference mode; its features of an image must not depend on the others of a batch.
        max_bytes: features beyond this much memory are computed again each time.
    """

    def __init__(self, backbone: Backbone, *, max_bytes: int = 2 * 1024**3):
        super().__init__()
        self._backbone = (backbone,)  # a tuple hides it from nn.Module's registration
        self._features: dict[bytes, dict[str, Tensor]] = {}
        self._bytes_left = max_bytes
        shapes = backbone.output_shape()
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._size_divisibility = math.lcm(_PADDING, max(backbone.size_divisibility, 1))

    @property
    def size_divisibility(self) -> int:
        """Of the sides of a padded batch."""
        return self._size_divisibility

    @torch.no_grad()
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W), by stage."""
        keys = [_key(image) for image in x]
        new = {key: index for index, key in enumerate(keys) if key not in self._features}
        computed: dict[bytes, dict[str, Tensor]] = {}
        if new:
            features = self._backbone[0](x[list(new.values())])
            for position, key in enumerate(new):
                computed[key] = {name: feature[position].clone() for name, feature in features.items()}
        found = [computed.get(key) or self._features[key] for key in keys]
        for key, of in computed.items():
            self._store(key, of)
        return {name: torch.stack([of[name] for of in found]) for name in self._out_features}

    def _store(self, key: bytes, features: dict[str, Tensor]) -> None:
        size = sum(feature.numel() * feature.element_size() for feature in features.values())
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._features[key] = features


def _key(image: Tensor) -> bytes:
    pixels = image.detach().cpu().contiguous()
    found = hashlib.sha256(pixels.numpy().data, usedforsecurity=False)  # processors have instructions for it
    found.update(str(tuple(pixels.shape)).encode())
    return found.digest()
