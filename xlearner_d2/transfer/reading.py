"""Images of a downstream set as a model is trained and tested on them."""

import os
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..data.loader import kill_readers_at_exit, prepare_process, reading_processes
from ..data.mappers import SourceMapper, map_one
from ..data.packing import PackingLoader
from ..data.samplers import Draw, JointSampler
from ..data.streams import Shuffled


class Mapped(Dataset[dict[str, Any]]):
    """Records as their mapper makes them: kept in memory if they are always the same and small, else made each time.

    Args:
        fixed: whether the mapper gives the same for a record each time.
        max_bytes: of the images of all records, judged by the first, up to which they are kept.
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], mapper: SourceMapper, *, fixed: bool, max_bytes: int = 1024**3
    ):
        self._records = records
        self._mapper = mapper
        self.is_kept = fixed and map_one(mapper, records, 0, seed=0)["image"].nbytes * len(records) <= max_bytes
        self._kept = [map_one(mapper, records, index, seed=0) for index in range(len(records))] if self.is_kept else []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self.draw(index, seed=0)

    def draw(self, index: int, *, seed: int) -> dict[str, Any]:
        """One record, augmented by ``seed``."""
        return self._kept[index] if self.is_kept else map_one(self._mapper, self._records, index, seed=seed)


class _Drawn(Dataset[dict[str, Any]]):
    """Some of the records, each as a draw of it says."""

    def __init__(self, data: Mapped, chosen: Sequence[int]):
        self._data = data
        self._chosen = chosen

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self._data.draw(self._chosen[draw.index], seed=draw.seed)


def training_batches(
    data: Mapped, chosen: Sequence[int], *, batch_size: int, seed: int, num_workers: int
) -> DataLoader[Any]:
    """Endless batches, shuffled epoch by epoch; a pure function of the seed."""
    streams = {"": Shuffled(len(chosen), seed=(seed, ""))}
    sampler = JointSampler(streams=streams, batch_sizes={"": batch_size}, seed=seed)
    return _make_loader(_Drawn(data, chosen), data, num_workers, batch_sampler=sampler)


def evaluation_batches(data: Mapped, *, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """All records, in order."""
    return _make_loader(data, data, num_workers, batch_size=batch_size)


def _make_loader(dataset: Dataset[dict[str, Any]], data: Mapped, num_workers: int, **options: Any) -> DataLoader[Any]:
    """Lists of records, read by processes of their own where these are not kept in memory."""
    kill_readers_at_exit(os.getpid())
    number = 0 if data.is_kept else reading_processes(num_workers)
    return PackingLoader(dataset, num_workers=number, collate_fn=list, worker_init_fn=prepare_process, **options)
