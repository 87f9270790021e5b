"""Batches on their way from the processes that read them: all that they hold in a single block of shared memory."""

import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Every tensor and array begins at a multiple of so many bytes, as PyTorch aligns what it allocates.
ALIGNMENT = 64


class PackedBatch:
    """Anything that can be pickled, the contents of its tensors and arrays in one block of bytes.

    PyTorch's loaders hand over each tensor by itself: a file descriptor, for which the processes connect to each other
    and prove who they are, a third of a millisecond on both sides (docs/SPEED.md).

    Args:
        batch: what :meth:`unpack` gives again, its tensors contiguous. Those that learn, or are sparse or quantised,
            are pickled as PyTorch does it.
    """

    def __init__(self, batch: Any):
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        pickler = _Pickler(stream, buffers)
        pickler.dump(batch)
        tensors, arrays = pickler.tensors, [buffer.raw() for buffer in buffers]
        self._pickled = stream.getvalue()
        self._kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self._sizes = [tensor.nbytes for tensor in tensors] + [array.nbytes for array in arrays]
        self._block = torch.empty(sum(map(_aligned, self._sizes)), dtype=torch.uint8).share_memory_()
        for place, tensor in zip(self._tensors(), tensors, strict=True):
            place.copy_(tensor)
        for part, array in zip(self._arrays(), arrays, strict=True):
            part[:] = array

    def unpack(self) -> Any:
        """The batch; its tensors and arrays are views of the block."""
        return _Unpickler(io.BytesIO(self._pickled), self._tensors(), self._arrays()).load()

    def pin_memory(self) -> "PackedBatch":
        """In page-locked memory, as PyTorch's loaders ask for before a batch goes to a GPU."""
        self._block = self._block.pin_memory()
        return self

    def _tensors(self) -> list[Tensor]:
        """Views of PyTorch's, which keep pinned memory until a copy to a GPU has read it; others would not."""
        places = zip(self._parts(), self._kinds, strict=False)
        return [part.view(dtype).view(shape) for part, (dtype, shape) in places]

    def _arrays(self) -> list[memoryview]:
        return [part.numpy().data for part in itertools.islice(self._parts(), len(self._kinds), None)]

    def _parts(self) -> Iterator[Tensor]:
        """Bytes of each tensor, then of each array."""
        starts = itertools.accumulate(map(_aligned, self._sizes), initial=0)
        return (self._block[start : start + size] for start, size in zip(starts, self._sizes, strict=False))


def _aligned(size: int) -> int:
    """Rounded up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Pickler(pickle.Pickler):
    """Leaves out what tensors hold: each is known by its number in ``tensors``."""

    def __init__(self, stream: io.BytesIO, buffers: list[pickle.PickleBuffer]):
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, found: Any) -> int | None:
        if type(found) is not Tensor or not _is_plain(found):
            return None
        if id(found) not in self._numbers:
            self._numbers[id(found)] = len(self.tensors)
            self.tensors.append(found)
        return self._numbers[id(found)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: Sequence[Tensor], arrays: Sequence[memoryview]):
        super().__init__(stream, buffers=arrays)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _is_plain(tensor: Tensor) -> bool:
    """Whether its contents, dtype and shape are all there is to it."""
    is_dense = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
    return is_dense and not tensor.requires_grad


def _pack(collate: Callable[[Sequence[Any]], Any], records: Sequence[Any]) -> PackedBatch:
    return PackedBatch(collate(records))


class PackingLoader(DataLoader[Any]):
    """PyTorch's loader, whose processes send each batch packed.

    Args:
        dataset, num_workers, options: as PyTorch's.
        collate_fn: makes a batch of a list of records; the loader's attribute of that name also packs it where there
            are processes.
    """

    def __init__(
        self, dataset: Dataset[Any], *, collate_fn: Callable[[Sequence[Any]], Any], num_workers: int, **options: Any
    ):
        collate = functools.partial(_pack, collate_fn) if num_workers else collate_fn
        super().__init__(dataset, collate_fn=collate, num_workers=num_workers, **options)

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return map(PackedBatch.unpack, batches) if self.num_workers else batches
