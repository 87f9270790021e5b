"""Batches on their way from the processes that read them: all arrays of one in a single block of shared memory."""

import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Every array begins at a multiple of so many bytes, which is as PyTorch aligns what it allocates.
ALIGNMENT = 64


class PackedBatch:
    """Anything that can be pickled, its tensors and arrays in one block of bytes.

    PyTorch's loaders hand over each tensor by itself: a file descriptor, for which the processes connect to each other
    and prove who they are, which takes a third of a millisecond on both sides. A batch of 24 images with boxes has 72
    tensors (docs/SPEED.md).

    Args:
        batch: what :meth:`unpack` gives again. Its tensors come back without strides of their own and without sharing
            memory with each other; tensors that NumPy has no type for are pickled as PyTorch does it.
    """

    def __init__(self, batch: Any):
        buffers: list[pickle.PickleBuffer] = []
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(batch)
        parts = [buffer.raw() for buffer in buffers]
        self._pickled = pickled.getvalue()
        self._sizes = [part.nbytes for part in parts]
        self._bytes = torch.empty(sum(map(_aligned, self._sizes)), dtype=torch.uint8).share_memory_()
        for place, part in zip(self._places(), parts, strict=True):
            place[:] = part

    def unpack(self) -> Any:
        """The batch; its tensors are views of the block."""
        return pickle.loads(self._pickled, buffers=self._places())

    def pin_memory(self, *_device: Any) -> "PackedBatch":
        """In page-locked memory, as PyTorch's loaders ask for before a batch goes to a GPU."""
        self._bytes = self._bytes.pin_memory()
        return self

    def _places(self) -> Iterator[memoryview]:
        """Where each array is."""
        block = memoryview(self._bytes.numpy())
        ends = itertools.accumulate(map(_aligned, self._sizes), initial=0)
        return (block[start : start + size] for start, size in zip(ends, self._sizes, strict=False))


def _aligned(size: int) -> int:
    """Rounded up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Pickler(pickle.Pickler):
    """Takes tensors for NumPy's arrays, which pickle outside of the stream."""

    def reducer_override(self, found: Any) -> Any:
        if type(found) is not Tensor or found.requires_grad:
            return NotImplemented
        try:
            return torch.from_numpy, (found.contiguous().numpy(),)
        except (TypeError, RuntimeError):  # such as bfloat16, sparse, or of a GPU
            return NotImplemented


def _pack(collate: Callable[[Sequence[Any]], Any], records: Sequence[Any]) -> PackedBatch:
    return PackedBatch(collate(records))


class PackingLoader(DataLoader[Any]):
    """PyTorch's loader, whose processes send each batch packed.

    Args:
        dataset, num_workers, options: as PyTorch's.
        collate_fn: makes a batch of a list of records.
    """

    def __init__(
        self, dataset: Dataset[Any], *, collate_fn: Callable[[Sequence[Any]], Any], num_workers: int, **options: Any
    ):
        collate = functools.partial(_pack, collate_fn) if num_workers else collate_fn
        super().__init__(dataset, collate_fn=collate, num_workers=num_workers, **options)

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return map(PackedBatch.unpack, batches) if self.num_workers else batches
