"""Every set × protocol × backbone × seed of a study: what is finished is kept, the rest runs, several at a time."""

import logging
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from ..config import load_config
from ..engine.memory import keep_freed_memory
from ..engine.provenance import git
from ..engine.workers import end_with_parent
from ..results.records import CellRecord, cell_file, read_record, read_records, write_record
from .backbones import BackboneSpec, fingerprint
from .places import Places
from .protocols import run_protocol, trivial_value
from .suite import Suite, parse_suite

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement; see :class:`CellRecord` for its parts."""

    set_name: str
    protocol: str
    backbone: BackboneSpec
    seed: int

    def __str__(self) -> str:
        return f"{self.set_name}, {self.protocol}, {self.backbone.name}, seed {self.seed}"

    def file(self, folder: Path) -> Path:
        """Where its record belongs."""
        return cell_file(
            folder, set_name=self.set_name, protocol=self.protocol, backbone=self.backbone.name, seed=self.seed
        )


def all_cells(suite: Suite, backbones: Sequence[BackboneSpec], seeds: Sequence[int]) -> list[Cell]:
    """In the order they run: seed by seed, and within it the protocols that count before the others."""
    sets = suite.sets.values()
    depth = max(len(spec.protocols) for spec in sets)
    return [
        Cell(set_name=spec.name, protocol=spec.protocols[rank], backbone=backbone, seed=seed)
        for seed in seeds
        for rank in range(depth)
        for spec in sets
        if rank < len(spec.protocols)
        for backbone in backbones
    ]


def unfinished(suite: Suite, cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """The cells without a record, or with one of other weights or settings."""
    prints = {(cell.backbone, cell.seed): "" for cell in cells}
    prints = {key: fingerprint(*key) for key in prints}
    settings = {
        (cell.set_name, cell.protocol): suite.settings(suite.sets[cell.set_name], suite.protocols[cell.protocol])
        for cell in cells
    }

    def finished(cell: Cell) -> bool:
        path = cell.file(folder)
        if not path.is_file():
            return False
        record = read_record(path)
        wanted = (prints[cell.backbone, cell.seed], settings[cell.set_name, cell.protocol])
        if (record.weights, record.settings) == wanted:
            return True
        logger.warning(f"{path} is of other weights or settings: it is measured again.")
        return False

    return [cell for cell in cells if not finished(cell)]


def mark_primary(suite: Suite, folder: Path) -> None:
    """Bring records that are kept up to date with which protocol of a set the suite names first."""
    for record in (record for record in read_records(folder) if record.set_name in suite.sets):
        primary = suite.primary[record.set_name] == record.protocol
        if record.primary != primary:
            where = {"set_name": record.set_name, "protocol": record.protocol}
            path = cell_file(folder, **where, backbone=record.backbone, seed=record.seed)
            write_record(replace(record, primary=primary), path)


def run_cell(suite: Suite, cell: Cell, folder: Path) -> CellRecord:
    """Measure one cell and keep its record."""
    started = time.perf_counter()
    spec, protocol = suite.sets[cell.set_name], suite.protocols[cell.protocol]
    weights = fingerprint(cell.backbone, cell.seed)
    name = f"{weights[:16] or f'random-{cell.seed}'}-{suite.feature_settings(spec, protocol)[:16]}.npz"
    cache = folder / "cache" / cell.set_name / name
    value, details = run_protocol(suite, spec, protocol, cell.backbone, seed=cell.seed, cache=cache)
    record = CellRecord(
        suite=suite.name,
        set_name=cell.set_name,
        family=spec.family,
        protocol=cell.protocol,
        primary=suite.primary[cell.set_name] == cell.protocol,
        metric=protocol.metric,
        backbone=cell.backbone.name,
        seed=cell.seed,
        value=value,
        trivial=trivial_value(spec, protocol),
        details=details,
        seconds=round(time.perf_counter() - started, 4),
        weights=weights,
        settings=suite.settings(spec, protocol),
        commit=commit(),
        hardware=hardware(suite.cfg.MODEL.DEVICE),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_record(record, cell.file(folder))
    return record


def commit() -> str:
    """The project's commit, with "+" when tracked files differ from it; "" outside of a repository."""
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def hardware(device: str) -> str:
    """The GPU, or the processor and the number of its cores that are in use."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


# Of a worker process: the suite it measures with, set once by _start_worker.
_suite: Suite


def _start_worker(suite_file: str, opts: Sequence[str], place: int, jobs: int) -> None:
    """Prepare the worker process of one of so many places."""
    global _suite
    end_with_parent()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loaders fork: a spawned loader process would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    threads = worker_threads(jobs)
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of scikit-learn and of what it is built on
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    _suite = parse_suite(load_config(suite_file, opts))
    if _suite.cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()


def worker_threads(jobs: int) -> int:
    """Threads of each of so many workers: their share of the cores, but no more than ``OMP_NUM_THREADS`` allows.

    More threads than cores are free make a linear probe several times slower: OpenBLAS's wait for each other busily.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(cores // jobs, torch.get_num_threads()))


def _work(cell: Cell, folder: Path) -> CellRecord:
    return run_cell(_suite, cell, folder)


def run_cells(
    cells: Sequence[Cell], *, suite_file: str, opts: Sequence[str], folder: Path, places: Places
) -> dict[Cell, BaseException]:
    """Run cells in worker processes, log each as it ends, and return the errors of those that failed.

    Args:
        suite_file, opts: the suite, read again in each worker.
        places: each has a worker of its own, from its first cell on.
    """
    failed: dict[Cell, BaseException] = {}
    started = time.monotonic()
    with (
        _Workers(suite_file, opts, folder, places) as workers,
        ThreadPoolExecutor(places.number) as pool,
        starts_no_more(pool, places),
    ):
        futures = {pool.submit(workers.run, cell): cell for cell in cells}
        for done, (cell, future) in enumerate(_as_completed(futures), 1):
            left = (time.monotonic() - started) / done * (len(cells) - done)
            progress = f"[{done}/{len(cells)}, {timedelta(seconds=round(left))} left]"
            error = future.exception()
            if error is not None:
                failed[cell] = error
                logger.error(f"{progress} {cell} failed: {error!r}")
                continue
            record = future.result()
            logger.info(f"{progress} {cell}: {record.metric} {record.value:.1f} in {record.seconds:.0f} s")
    return failed


#: So many workers that end before they are ready have a reason that the next one will have, too.
MOST_FAILED_STARTS = 3


class _Workers:
    """A process for each place that has been taken; one that dies takes its cell with it, but not the next."""

    def __init__(self, suite_file: str, opts: Sequence[str], folder: Path, places: Places):
        self._suite = (suite_file, tuple(opts))
        self._folder = folder
        self._places = places
        self._workers: dict[int, ProcessPoolExecutor] = {}
        self._failed_starts = 0

    def run(self, cell: Cell) -> CellRecord:
        """Wait for a place, and measure a cell in its process."""
        with self._places.take() as place:
            if place not in self._workers:
                self._workers[place] = self._start(place)
            try:
                return self._workers[place].submit(_work, cell, self._folder).result()
            except BrokenProcessPool:
                self._workers.pop(place).shutdown()
                raise

    def _start(self, place: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        initargs = (*self._suite, place, self._places.number)
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise BrokenProcessPool(f"not started, as {MOST_FAILED_STARTS} workers before it ended at once")
        worker = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=initargs)
        try:
            worker.submit(os.getpid).result()
        except BrokenProcessPool:
            self._failed_starts += 1
            worker.shutdown()
            raise
        self._failed_starts = 0
        return worker

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_error: object) -> None:
        for worker in self._workers.values():
            worker.shutdown()


@contextmanager
def starts_no_more(pool: Executor, places: Places) -> Iterator[None]:
    """Ctrl-C: without this, leaving the pool would first do all that waits in it, or for a place."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info("Stopping as soon as what runs has ended; the same command goes on from there.")
        places.close()
        pool.shutdown(cancel_futures=True)
        raise


def _as_completed(futures: "dict[Future[CellRecord], Cell]") -> "Iterator[tuple[Cell, Future[CellRecord]]]":
    for future in as_completed(futures):
        yield futures[future], future
