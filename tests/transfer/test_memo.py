"""A backbone that remembers is the backbone it wraps, only faster."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xlearner_d2.evaluation.probe import linear_probe
from xlearner_d2.transfer.memo import MemoisedBackbone

CHANNELS = 6


class Counting(Backbone):
    """Two stages, and how many images they have seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.res2 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.res3 = nn.Conv2d(4, CHANNELS, 3, stride=2, padding=1)
        self.num_images = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.num_images += len(x)
        fine = self.res2(x)
        return {"res2": fine, "res3": self.res3(fine)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=4, stride=4), "res3": ShapeSpec(channels=CHANNELS, stride=8)}

    @property
    def size_divisibility(self) -> int:
        return 8


def image(number: int, side: int = 16) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(number))


def batch(numbers: Sequence[int], side: int = 16) -> Tensor:
    return torch.stack([image(number, side) for number in numbers])


@pytest.fixture
def backbone() -> Counting:
    return Counting().eval()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([8, 16])), max_size=6),
    st.sampled_from([0, 500, 10**9]),
)
def test_features_are_those_of_the_backbone(batches: list[tuple[list[int], int]], max_bytes: int) -> None:
    backbone = Counting().eval()
    memoised = MemoisedBackbone(backbone, max_bytes=max_bytes)
    for numbers, side in batches:
        images = batch(numbers, side)
        with torch.no_grad():
            expected = backbone(images)
        found = memoised(images)
        assert list(found) == list(expected)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=6))
def test_each_image_is_computed_once(batches: list[list[int]]) -> None:
    backbone = Counting().eval()
    memoised = MemoisedBackbone(backbone)
    for numbers in batches:
        memoised(batch(numbers))
    assert backbone.num_images == len({number for numbers in batches for number in numbers})


def test_without_memory_all_is_computed_again(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone, max_bytes=0)
    for _ in range(3):
        memoised(batch([1, 2]))
    assert backbone.num_images == 6


def test_memory_is_a_limit(backbone: Counting) -> None:
    """Features of one 16-pixel image: 4 x 4 x 4 and 6 x 2 x 2 numbers of 4 bytes, 352 in all."""
    memoised = MemoisedBackbone(backbone, max_bytes=2 * 352)
    for _ in range(2):
        for number in range(3):
            memoised(batch([number]))
    assert backbone.num_images == 4  # the third image twice


def test_same_pixels_in_another_shape_are_another_image(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone)
    memoised(torch.zeros(1, 3, 8, 32))
    assert memoised(torch.zeros(1, 3, 32, 8))["res2"].shape == (1, 4, 8, 2)


def test_memory_format_of_the_images_does_not_matter(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone)
    memoised(batch([0, 1]))
    memoised(batch([0, 1]).contiguous(memory_format=torch.channels_last))
    assert backbone.num_images == 2


def test_what_is_remembered_cannot_be_changed_from_outside(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone)
    first = memoised(batch([0]))["res3"]
    expected = first.clone()
    first.zero_()
    assert torch.equal(memoised(batch([0]))["res3"], expected)


def test_images_of_many_sizes_are_computed_once_whatever_they_are_batched_with(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone)
    images = [torch.ones(3, height, width) for height, width in ((40, 50), (57, 33), (64, 61))]
    for chosen in ([0, 1], [2, 1], [0], [1, 2, 0]):
        padded = ImageList.from_tensors([images[number] for number in chosen], memoised.size_divisibility)
        assert memoised(padded.tensor)["res2"].shape[-2:] == (16, 16)
    assert backbone.num_images == 3


def test_it_is_a_backbone_of_the_same_shape_that_owns_nothing(backbone: Counting) -> None:
    memoised = MemoisedBackbone(backbone)
    assert memoised.output_shape() == backbone.output_shape()
    assert memoised.size_divisibility == 32
    assert list(memoised.parameters()) == []
    memoised.train()
    assert not backbone.training
    images = batch([0]).requires_grad_()
    assert not memoised(images)["res2"].requires_grad


def test_a_probe_of_remembered_features_is_the_same(backbone: Counting) -> None:
    """Three classes of brightness, seen in shuffled batches over two epochs."""
    labels = np.arange(24) % 3
    images = torch.stack([image(number) + 2.0 * float(label) for number, label in enumerate(labels)])
    memoised = MemoisedBackbone(backbone)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in order.split(5):
        memoised(images[rows])
    with torch.no_grad():
        features = [network(images)["res3"].mean(dim=(2, 3)).numpy() for network in (backbone, memoised)]
    results = [linear_probe((x, labels), (x, labels), seed=0) for x in features]
    assert results[0] == results[1]
    assert results[0].accuracy > 60
