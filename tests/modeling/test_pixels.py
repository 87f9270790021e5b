"""Normalised images are the same bit for bit, whether they go together or one by one."""

import pytest
import torch
from detectron2.structures import ImageList

from xlearner_d2.modeling.pixels import normalise


@pytest.mark.parametrize("sizes", [[(5, 7)] * 3, [(5, 7), (6, 4), (5, 7)], [(5, 7)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_together_as_one_by_one(sizes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator).to(dtype) for size in sizes]
    mean, std = torch.tensor([103.53, 116.28, 123.675]).view(-1, 1, 1), torch.tensor([57.0, 58.0, 59.0]).view(-1, 1, 1)
    expected = ImageList.from_tensors([(image - mean) / std for image in images], 4)
    found = ImageList.from_tensors(normalise(images, mean, std), 4)
    assert torch.equal(found.tensor.flatten(0, -4), expected.tensor)
