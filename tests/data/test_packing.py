"""What arrives from a process that reads is what it sent, in one piece."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xlearner_d2.data.packing import ALIGNMENT, PackedBatch, PackingLoader

DTYPES = ("uint8", "int16", "int64", "float16", "float32", "float64", "bool", "complex64")
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))
LEAVES = st.one_of(ARRAYS, ARRAYS.map(torch.from_numpy), st.text(), st.integers(), st.none())
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def assert_same(found: Any, sent: Any) -> None:
    assert type(found) is type(sent)
    if isinstance(sent, dict):
        assert list(found) == list(sent)
        found, sent = list(found.values()), list(sent.values())
    if isinstance(sent, list):
        assert len(found) == len(sent)
        for one, other in zip(found, sent, strict=True):
            assert_same(one, other)
    elif isinstance(sent, Tensor):
        assert found.dtype == sent.dtype
        torch.testing.assert_close(found, sent, rtol=0, atol=0, equal_nan=True)
    elif isinstance(sent, np.ndarray):
        assert found.dtype == sent.dtype
        np.testing.assert_array_equal(found, sent)
    else:
        assert found == sent


def carried(batch: Any) -> Any:
    return PackedBatch(batch).unpack()


@settings(deadline=None, max_examples=60)
@given(TREES)
def test_any_batch_comes_out_as_it_went_in(batch):
    assert_same(carried(batch), batch)


@settings(deadline=None, max_examples=40)
@given(st.lists(ARRAYS.map(torch.from_numpy), min_size=1, max_size=5))
def test_tensors_are_aligned_apart_from_each_other_and_may_be_written(sent):
    found = carried(sent)
    for number, tensor in enumerate(found):
        assert not tensor.numel() or tensor.data_ptr() % ALIGNMENT == 0
        tensor.zero_()
        assert_same(found[number + 1 :], sent[number + 1 :])


def instances() -> Instances:
    found = Instances((20, 30))
    found.gt_boxes = Boxes(torch.tensor([[1.0, 2, 10, 12], [3, 4, 5, 6]]))
    found.gt_classes = torch.tensor([3, 0])
    found.gt_masks = PolygonMasks([[np.array([1.0, 2, 10, 2, 10, 12])], [np.array([3.0, 4, 5, 4, 5, 6])]])
    found.gt_bitmasks = BitMasks(torch.arange(1200).view(2, 20, 30) % 7 == 0)
    return found


def test_instances_of_detectron2():
    sent = instances()
    found = carried([{"image": torch.ones(3, 20, 30), "instances": sent, "file_name": "a.jpg"}])[0]["instances"]
    assert found.image_size == sent.image_size
    assert list(found.get_fields()) == list(sent.get_fields())
    assert_same(found.gt_boxes.tensor, sent.gt_boxes.tensor)
    assert_same(found.gt_classes, sent.gt_classes)
    assert_same(found.gt_bitmasks.tensor, sent.gt_bitmasks.tensor)
    assert_same([list(polygons) for polygons in found.gt_masks.polygons], sent.gt_masks.polygons)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).T,
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(6.0)[::2],
        torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0]).requires_grad_(),
        torch.tensor([1 + 2j]).conj(),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=["transposed", "channels last", "strided", "bfloat16", "requires gradient", "conjugate", "parameter"],
)
def test_tensors_that_numpy_would_not_hold_or_hold_otherwise(tensor):
    found = carried([tensor])[0]
    assert found.requires_grad == tensor.requires_grad
    assert found.layout == tensor.layout
    assert_same(found, tensor)


class Records(Dataset[dict[str, Any]]):
    """Made anew each time, of many tensors; ``broken`` raises."""

    def __init__(self, broken: int = -1):
        self.broken = broken

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.broken:
            raise KeyError("no such image")
        return {"number": index, "parts": [torch.full((3,), index + part) for part in range(10)]}


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_send_what_is_read_without_them(start):
    here = list(PackingLoader(Records(), batch_size=4, collate_fn=list, num_workers=0))
    sent = list(PackingLoader(Records(), batch_size=4, collate_fn=list, num_workers=2, multiprocessing_context=start))
    assert len(sent) == len(here) == 8
    assert_same(sent, here)


def test_an_error_of_a_process_is_raised_here():
    with pytest.raises(KeyError, match="no such image"):
        list(PackingLoader(Records(broken=9), batch_size=4, collate_fn=list, num_workers=1))


def open_files(loader: DataLoader[Any]) -> int:
    """Files that are open for batches that are kept."""
    before = len(os.listdir("/proc/self/fd"))
    batches = iter(loader)
    kept = [next(batches) for _ in range(len(loader))]
    del batches
    after = len(os.listdir("/proc/self/fd"))
    assert len(kept) == 8
    return after - before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open files")
def test_a_batch_takes_an_open_file_for_each_dtype_however_many_tensors_it_has():
    loaders = (kind(Records(), batch_size=4, collate_fn=list, num_workers=1) for kind in (PackingLoader, DataLoader))
    packed, plain = map(open_files, loaders)
    assert packed <= 8 + 4  # of one dtype
    assert plain >= 8 * 30


def test_what_cannot_be_pickled_is_said():
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        PackedBatch([lambda: None])


def test_pinning_pins_the_block(monkeypatch):
    packed = PackedBatch([torch.arange(5), {"image": torch.ones(3, 4)}])
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    found = packed.pin_memory().unpack()
    assert len(pinned) == 2  # int64 and float32
    assert_same(found, [torch.arange(5), {"image": torch.ones(3, 4)}])


def test_a_tensor_that_occurs_twice_is_sent_once():
    shared = torch.arange(1000)
    packed = PackedBatch([shared, {"again": shared}])
    first, second = packed.unpack()
    second["again"][0] = 7
    assert first[0] == 7
    assert sum(block.nbytes for block in packed._blocks.values()) < 2 * shared.nbytes


def test_tensors_are_views_of_pytorch_s_own():
    """Its allocator of pinned memory knows by the storage which block a copy to a GPU still reads."""
    packed = PackedBatch([np.ones(7), {"image": torch.ones(3, 4)}, torch.arange(5)])
    array, record, numbers = packed.unpack()
    for tensor in (record["image"], numbers):
        block = packed._blocks[tensor.dtype]
        assert tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    assert_same(array, np.ones(7))


def test_a_batch_can_be_saved_as_it_is_where_a_step_fails(tmp_path):
    sent = [{"image": torch.ones(3, 4), "labels": torch.arange(5), "mask": torch.ones(2, dtype=torch.bool)}]
    torch.save(carried(sent), tmp_path / "batch.pth")
    assert_same(torch.load(tmp_path / "batch.pth"), sent)


def test_a_label_that_is_changed_in_place_is_not_taken_for_another():
    """As autograd would, which needs what a loss has read: on a CPU a model gets these very tensors."""
    labels, weights = carried([torch.arange(4.0), torch.arange(4.0)])
    parameter = torch.ones(4, requires_grad=True)
    loss = (parameter * weights).sum()
    labels += 1
    loss.backward()
    assert torch.equal(parameter.grad, torch.arange(4.0))
    assert torch.equal(labels, torch.arange(1.0, 5.0))
