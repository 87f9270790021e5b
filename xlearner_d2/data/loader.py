"""Source-tagged batches: one pool of workers that reads every source's share of each step."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.util import Finalize
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..specs import SourceSpec
from .balance import build_stream
from .mappers import Record, SourceMapper, build_mapper, map_one
from .packing import PackingLoader
from .samplers import Draw, JointSampler


class JointDataset(Dataset[Record]):
    """Records of all sources, mapped when drawn.

    Args:
        records: by source; see :class:`.sources.SourceData`.
        mappers: by source.
    """

    def __init__(self, *, records: Mapping[str, Sequence[Record]], mappers: Mapping[str, SourceMapper]):
        self.records = dict(records)
        self.mappers = dict(mappers)

    def __getitem__(self, draw: Draw) -> Record:
        return map_one(self.mappers[draw.source], self.records[draw.source], draw.index, seed=draw.seed)


def group_by_source(batch: Sequence[Record]) -> dict[str, list[Record]]:
    """``{source: mapped records}``, sources in the order they were drawn in."""
    grouped: dict[str, list[Record]] = {}
    for record in batch:
        grouped.setdefault(record["source"], []).append(record)
    return grouped


def build_joint_train_loader(
    sources: Sequence[SourceSpec],
    heads: Mapping[str, CfgNode],
    records: Mapping[str, Sequence[Record]],
    *,
    seed: int,
    turns: Mapping[str, int] | None = None,
    num_workers: int = 2,
) -> DataLoader[Any]:
    """An endless loader of ``{source: list of mapped records}``, each with this worker's share of the step's sources.

    Args:
        heads: config of each source's head, which decides its augmentation.
        records: by source, its training records.
        turns: see :class:`.samplers.Turns`; None: every step draws from every source.
        seed: decides the order and the augmentation of every image, whatever ``num_workers`` is.
        num_workers: see :func:`reading_processes`.
    """
    num_workers = reading_processes(num_workers)
    kill_readers_at_exit(os.getpid())
    sampler = JointSampler(
        streams={s.name: build_stream(s, heads[s.name], records[s.name], seed=seed) for s in sources},
        batch_sizes={source.name: source.ims_per_batch for source in sources},
        turns=turns,
        seed=seed,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    mappers = {s.name: SourceMapper(s.name, build_mapper(heads[s.name], is_train=True)) for s in sources}
    return PackingLoader(
        JointDataset(records=records, mappers=mappers),
        batch_sampler=sampler,
        collate_fn=group_by_source,
        num_workers=num_workers,
        worker_init_fn=prepare_process,
        # Its own, or starting the loader would draw a number from the model's, in a resumed run at another step.
        generator=torch.Generator().manual_seed(seed),
        pin_memory=any(head.MODEL.DEVICE.startswith("cuda") for head in heads.values()),
        # A single process needs some reserve, as steps differ in length; many would keep much memory for it.
        prefetch_factor=max(2, 4 // num_workers) if num_workers else None,
    )


def reading_processes(wanted: int) -> int:
    """``DATALOADER.NUM_WORKERS``; for -1, one per CPU core that this worker may use beside its own, from 1 to 8."""
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // comm.get_local_size() - 1, 1), 8)


def start_at(loader: DataLoader[Any], step: int) -> None:
    """Make a joint loader that has not been iterated yet begin with ``step``."""
    assert isinstance(loader.batch_sampler, JointSampler)
    loader.batch_sampler.start = step


@functools.cache
def kill_readers_at_exit(_process: int) -> None:
    """At this process's end, which would send SIGTERM to those that read for it, and wait for them.

    Args:
        _process: its id, as a forked process has readers of its own.
    """
    Finalize(None, _kill_readers, exitpriority=10)


def _kill_readers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def prepare_process(_worker: int) -> None:
    """What a loader's process does first."""
    # Ctrl-C in a terminal reaches this process, too, and so does SIGTERM from torchrun or a scheduler, but the one that
    # trains needs it until its step is finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Several workers with several threads each would fight over the processors that training needs.
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def build_test_loader(
    head: CfgNode, records: Sequence[Record], *, batch_size: int = 1, num_workers: int = 2
) -> DataLoader[Any]:
    """Each worker's contiguous share of ``records``, in order, mapped for inference."""
    return build_detection_test_loader(
        list(records),
        mapper=build_mapper(head, is_train=False),
        batch_size=batch_size,
        num_workers=reading_processes(num_workers),
    )
