"""Batches on their way from the processes that read them: all that they hold in a few blocks of shared memory."""

import functools
import io
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Every tensor and array begins at a multiple of so many bytes, as PyTorch aligns what it allocates.
ALIGNMENT = 64


class PackedBatch:
    """Anything that can be pickled, the contents of its tensors and arrays in one block of memory for each dtype.

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
        self._num_tensors = len(tensors)
        self._places: list[tuple[torch.dtype, int, Sequence[int]]] = []  # dtype, start and shape of each
        sizes: Counter[torch.dtype] = Counter()
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        for dtype, shape in kinds + [(torch.uint8, torch.Size([array.nbytes])) for array in arrays]:
            self._places.append((dtype, sizes[dtype], shape))
            sizes[dtype] += _aligned(math.prod(shape), dtype)
        # One of bytes for all would do, but torch.save takes no batch whose tensors share memory as different dtypes.
        self._blocks = {dtype: torch.empty(size, dtype=dtype).share_memory_() for dtype, size in sizes.items()}
        views = self._views()
        for place, tensor in zip(views, tensors, strict=False):
            place.copy_(tensor)
        for place, array in zip(views[len(tensors) :], arrays, strict=True):
            place.numpy().data[:] = array

    def unpack(self) -> Any:
        """The batch; its tensors and arrays are views of the blocks."""
        views = self._views()
        arrays = [view.numpy().data for view in views[self._num_tensors :]]
        return _Unpickler(io.BytesIO(self._pickled), views[: self._num_tensors], arrays).load()

    def pin_memory(self) -> "PackedBatch":
        """In page-locked memory, as PyTorch's loaders ask for before a batch goes to a GPU."""
        self._blocks = {dtype: block.pin_memory() for dtype, block in self._blocks.items()}
        return self

    def _views(self) -> list[Tensor]:
        """PyTorch's own, which keep pinned memory until a copy to a GPU has read it; NumPy's would not.

        By ``data``, as autograd would count a change of one as a change of all.
        """
        places = self._places
        return [self._blocks[dtype][at : at + math.prod(shape)].view(shape).data for dtype, at, shape in places]


def _aligned(count: int, dtype: torch.dtype) -> int:
    """Rounded up, so that what follows is aligned."""
    step = ALIGNMENT // dtype.itemsize
    return -(-count // step) * step


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
    is_dense = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return is_dense and not (tensor.is_quantized or tensor.is_nested or tensor.requires_grad)


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
