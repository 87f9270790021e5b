"""Convolutions as products: the same function as PyTorch's, where they are used and where not."""

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.layers import Conv2d as NormedConv2d
from detectron2.layers import get_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xlearner_d2.modeling.small_maps import SmallMapConvolution, multiply_small_maps


def channels_last(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return values.to(memory_format=torch.channels_last).requires_grad_()


def gradients(result: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weighing = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad(result, of, weighing)


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    whole=st.booleans(),
)
def test_it_is_a_convolution(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], whole: bool
) -> None:
    images, weight = channels_last(2, 3, *size), channels_last(4, 3, *kernel, seed=1)
    found = SmallMapConvolution.apply(images, weight, stride, padding, whole)
    expected = F.conv2d(images, weight, stride=stride, padding=padding)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, images, weight), gradients(expected, images, weight), strict=True):
        torch.testing.assert_close(one, other)


def test_without_padding_and_with_a_frozen_weight() -> None:
    images, weight = channels_last(2, 3, 5, 4), channels_last(4, 3, 3, 3).detach()
    found = SmallMapConvolution.apply(images, weight, (1, 1), (0, 0), True)
    expected = F.conv2d(images, weight)
    torch.testing.assert_close(gradients(found, images), gradients(expected, images))


def normed(in_channels: int, out_channels: int) -> nn.Module:
    """With a smooth activation: a ReLU's kink makes a large gradient of a small difference."""
    norm = get_norm("BN", out_channels)
    return NormedConv2d(in_channels, out_channels, 3, padding=1, bias=False, norm=norm, activation=F.silu)


def step(model: nn.Module, images: Tensor, *, low: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        result = model(images)
    return result, list(gradients(result, *model.parameters()))


def products(result: Tensor) -> set[str]:
    """Names of this module's function in the graph of a result."""
    found, ahead = set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        found |= {type(node).__name__} & {"SmallMapConvolutionBackward"}
        ahead += [further for further, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    ("make", "images", "used"),
    [
        (lambda: nn.Conv2d(256, 512, 3, stride=2, padding=1), (2, 256, 6, 6), True),
        (lambda: normed(512, 512), (2, 512, 3, 3), True),
        (lambda: nn.Conv2d(256, 256, 3, padding=1), (2, 256, 6, 6), True),
        (
            lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
            (2, 8, 1, 1),
            True,
        ),  # one position: PyTorch's gradient is wrong there
        (lambda: nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6), False),  # few channels
        (lambda: nn.Conv2d(256, 256, 3, padding=1), (2, 256, 40, 40), False),  # many positions
        (lambda: nn.Conv2d(256, 512, 1), (2, 256, 3, 3), False),
        (lambda: nn.Conv2d(512, 512, 3, padding=1, groups=2), (2, 512, 3, 3), False),
        (lambda: nn.Conv2d(512, 512, 3, padding=2, dilation=2), (2, 512, 3, 3), False),
        (lambda: nn.Conv2d(512, 512, 3, padding="same"), (2, 512, 3, 3), False),
    ],
)
def test_where_it_is_used(
    make: Callable[[], nn.Module], images: tuple[int, ...], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, results and gradients are near to those of float32; in float32 nothing changes with AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    changed = copy.deepcopy(model)
    multiply_small_maps(changed)
    assert changed.state_dict().keys() == model.state_dict().keys()
    given = channels_last(*images, dtype=torch.float32)
    exact, exact_gradients = step(model, given, low=False)
    same, same_gradients = step(changed, given, low=False)
    assert torch.equal(exact, same)
    assert all(torch.equal(one, other) for one, other in zip(exact_gradients, same_gradients, strict=True))
    found, found_gradients = step(changed, given, low=True)
    assert bool(products(found)) == used
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip([found, *found_gradients], [exact, *exact_gradients], strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(
    ("make", "images", "used"),
    [
        (lambda: nn.Conv2d(256, 512, 3, stride=2, padding=1, bias=False), (2, 256, 6, 6), True),
        (lambda: normed(512, 512), (2, 512, 3, 3), True),
        (lambda: nn.Conv2d(256, 512, 3, padding=1), (2, 256, 3, 3), False),  # a bias is added in the same call
        (lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False), (2, 8, 1, 1), False),
        (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (2, 256, 40, 40), False),
    ],
)
def test_in_float32_without_avx512_weight_gradients_alone_are_products(
    make: Callable[[], nn.Module], images: tuple[int, ...], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    changed = copy.deepcopy(model)
    multiply_small_maps(changed)
    given = channels_last(*images, dtype=torch.float32)
    expected, found = model(given), changed(given)
    assert torch.equal(found, expected)
    assert bool(products(found)) == used
    of_images, *of_weights = gradients(found, given, *changed.parameters())
    expected_of_images, *expected_of_weights = gradients(expected, given, *model.parameters())
    assert torch.equal(of_images, expected_of_images)
    torch.testing.assert_close(of_weights, expected_of_weights, rtol=1e-4, atol=1e-4)


def test_a_kernel_larger_than_the_image() -> None:
    model = nn.Conv2d(256, 512, 3)
    multiply_small_maps(model)
    images = torch.zeros(2, 256, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="can't be greater than actual input"):
        model(images)


def test_no_images() -> None:
    model = nn.Conv2d(256, 512, 3, padding=1)
    multiply_small_maps(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(0, 256, 3, 3)).shape == (0, 512, 3, 3)


def test_in_a_part_that_runs_again() -> None:
    """The backward pass of a checkpointed part runs outside of autocast's context, but with its setting."""
    torch.manual_seed(0)
    model = nn.Conv2d(256, 512, 3, padding=1)
    multiply_small_maps(model)
    images = channels_last(2, 256, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        once = model(images)
        again = checkpoint(model, images, use_reentrant=False)
    for one, other in zip(gradients(once, model.weight), gradients(again, model.weight), strict=True):
        assert torch.equal(one, other)
