"""Convolutions of many channels over few positions as matrix products, for training on CPUs.

res5 of an image of 96 pixels has 3 × 3 positions. oneDNN's kernels, above all those of weight gradients, are made for
larger maps, and in bfloat16 are up to ten times slower there than one product (docs/SPEED.md). And on a map of one
position, PyTorch 2.14 leaves parts of a weight gradient unwritten on some CPUs, which a product does not.

In float32 only weight gradients are products, so that results stay those of PyTorch bit for bit, and only on CPUs
without AVX-512, where it was measured.
"""

from typing import Any

import torch
from detectron2.layers import Conv2d as NormedConv2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

#: From so many pairs of channels on, a weight gradient over up to so many positions of a batch is a product.
WEIGHT_PAIRS, WEIGHT_POSITIONS = 256 * 256, 1536
#: The same for everything.
ALL_PAIRS, ALL_POSITIONS = 256 * 512, 512


class SmallMapConvolution(torch.autograd.Function):
    """``torch.nn.functional.conv2d`` without bias, groups or dilation; its weight gradient is one matrix product.

    Tensors are channels last in memory: images (N, C, H, W), weight (D, C, height, width), result (N, D, H', W').
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], whole: bool
    ) -> Tensor:
        """Convolve.

        Args:
            whole: whether result and gradient of the images are products, too.
        """
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding, ctx.whole = stride, padding, whole
        if not whole:
            return nn.functional.conv2d(images, weight, stride=stride, padding=padding)
        found = patches(images, weight.shape[2:], stride, padding) @ _matrix(weight).T
        return found.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of images and weight."""
        images, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        of_images = of_weight = None
        if ctx.needs_input_grad[0] and ctx.whole:
            of_images = _scatter(gradient, weight, images.shape, stride, padding)
        elif ctx.needs_input_grad[0]:
            of_images = conv2d_input(images.shape, weight, gradient, stride=stride, padding=padding)
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (N*H'*W', D)
            columns = patches(images, weight.shape[2:], stride, padding).flatten(0, 2)
            product = rows.T @ columns
            of_weight = product.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
        return of_images, of_weight, None, None, None


def patches(images: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """What a kernel sees at each position: (N, H', W', height * width * C), of images (N, C, H, W)."""
    padded = nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return torch.cat([padded[:, rows, columns] for rows, columns in _shifts(padded.shape, kernel, stride)], dim=-1)


def _shifts(padded: torch.Size, kernel: torch.Size, stride: tuple[int, int]) -> list[tuple[slice, slice]]:
    """By element of a kernel, the rows and columns of padded images (N, H, W, C) that it is multiplied with."""
    height, width = kernel
    return [
        (slice(top, padded[1] - height + top + 1, stride[0]), slice(left, padded[2] - width + left + 1, stride[1]))
        for top in range(height)
        for left in range(width)
    ]


def _matrix(weight: Tensor) -> Tensor:
    """A weight (D, C, height, width) as (D, height * width * C): a view when it is channels last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _scatter(
    gradient: Tensor, weight: Tensor, shape: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of images of a shape: each position gives each element of its patch its share."""
    number, channels, height, width = shape
    shares = gradient.permute(0, 2, 3, 1) @ _matrix(weight)  # (N, H', W', height * width * C)
    summed = shares.new_zeros(number, height + 2 * padding[0], width + 2 * padding[1], channels)
    shifts = _shifts(summed.shape, weight.shape[2:], stride)
    for (rows, columns), share in zip(shifts, shares.split(channels, dim=-1), strict=True):
        summed[:, rows, columns] += share
    inner = summed[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inner.permute(0, 3, 1, 2)


class _Multiplying(nn.Conv2d):
    """A convolution that is a product where that is faster; one of larger maps stays as it is."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = (self.stride[0], self.stride[1]), (int(self.padding[0]), int(self.padding[1]))
        kind = _kind(input, weight, bias, stride, padding)
        if kind is None:
            return super()._conv_forward(input, weight, bias)
        dtype = _dtype(input)
        found: Tensor = SmallMapConvolution.apply(input.to(dtype), weight.to(dtype), stride, padding, kind == "whole")
        return found if bias is None else found + bias.to(dtype).view(-1, 1, 1)


def _dtype(images: Tensor) -> torch.dtype:
    """What a convolution of these images computes in."""
    autocast = torch.is_autocast_enabled("cpu") and images.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if autocast else images.dtype


def _kind(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> str | None:
    """What of a convolution is a product: "whole", "weight" (its gradient), or None."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    low = _dtype(images) == torch.bfloat16
    if not low and not (_dtype(images) == torch.float32 and bias is None and _without_avx512()):
        return None
    number, channels, *size = images.shape
    rows, columns = ((size[axis] + 2 * padding[axis] - weight.shape[2 + axis]) // stride[axis] + 1 for axis in range(2))
    pairs, positions = len(weight) * channels, number * rows * columns
    if min(number, rows, columns) < 1:  # no images, or a kernel larger than they are, which PyTorch complains about
        return None
    if low and positions <= ALL_POSITIONS and pairs >= ALL_PAIRS:
        return "whole"
    if positions <= WEIGHT_POSITIONS and (pairs >= WEIGHT_PAIRS or (low and rows * columns == 1)):
        return "weight"
    return None


def _without_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class _MultiplyingConv2d(_Multiplying):
    """In the place of PyTorch's."""


class _MultiplyingNormedConv2d(_Multiplying, NormedConv2d):
    """In the place of Detectron2's, which has a norm layer and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """As Detectron2's, but for how it convolves."""
        layers: tuple[Any, ...] = (self.norm, self.activation)
        x = self._conv_forward(x, self.weight, self.bias)
        for layer in layers:
            x = x if layer is None else layer(x)
        return x


_CLASSES: dict[type, type] = {nn.Conv2d: _MultiplyingConv2d, NormedConv2d: _MultiplyingNormedConv2d}
#: Ordinary convolutions: PyTorch's, Detectron2's, and what stands in their place.
CONVOLUTIONS = (*_CLASSES, *_CLASSES.values())


def multiply_small_maps(model: nn.Module) -> None:
    """Make the convolutions of a model products where that is faster; its parameters and their names stay."""
    for module in model.modules():
        if type(module) in _CLASSES and _is_plain(module):
            module.__class__ = _CLASSES[type(module)]


def _is_plain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size != (1, 1)
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
