"""What models do to pixels before their first layer."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Sequence[Tensor], mean: Tensor, std: Tensor) -> list[Tensor]:
    """Images (3, H, W) of any type less the mean, divided by std, for ``ImageList.from_tensors`` to pad and stack.

    Those of one size are normalised together, as on a GPU what counts is the number of calls. The list then has one
    tensor (N, 3, H, W), and the image list's tensor a dimension more: ``flatten(0, -4)`` makes both kinds alike.
    """
    if len({image.shape for image in images}) == 1:
        return [(torch.stack(list(images)) - mean) / std]
    return [(image - mean) / std for image in images]
