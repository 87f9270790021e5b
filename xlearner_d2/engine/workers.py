"""The workers of a run: who they are, what happens to all when one fails, and waiting for one that takes long."""

import functools
import logging
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from detectron2.utils import comm

from ..specs import ConfigError
from .lifeline import Ending, Lifeline, admit, knock, open_door
from .stopping import RunStopped

logger = logging.getLogger(__name__)

#: Seconds in which the cause of a broken collective operation becomes known, and in which news reach all workers.
_NEWS, _DELIVERY = 5.0, 1.0


@dataclass(frozen=True)
class Worker:
    """One process of a run.

    Attributes:
        rank: among all workers, machine by machine.
        machine: number of its machine.
        host: that machine's name.
        process: its id there.
    """

    rank: int
    machine: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"Worker {self.rank} (process {self.process} on {self.host})"


def patient_group() -> dist.ProcessGroup | None:
    """All workers, for operations in which they wait for one that takes long; None where there is one worker."""
    return _all_workers("waiting") if comm.get_world_size() > 1 else None


@functools.lru_cache
def _all_workers(_purpose: str) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    assert isinstance(group, dist.ProcessGroup)  # every worker is in it
    return group


def wait_for_all() -> None:
    """Wait for all workers however long one takes, as for an evaluation that one does for all.

    One that dies or hangs ends the wait all the same: see :mod:`.lifeline`.
    """
    if comm.get_world_size() > 1:
        dist.barrier(group=patient_group())


def wait_briefly_for_all(seconds: float) -> None:
    """Let workers that fail together finish; for one that fails alone the time is lost.

    Args:
        seconds: after which the others are taken to have no reason to come.
    """
    if comm.get_world_size() > 1:
        with suppress(RuntimeError):  # of torch, when time is up
            together = dist.barrier(group=_all_workers("ending"), async_op=True)
            assert together is not None
            together.wait(timedelta(seconds=seconds))


def end_with_parent() -> None:
    """From now on, end this process when its parent does: it would wait for work, or do some for nobody."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(main: Callable[[], object], *, host: str, silence: float, stuck: float, may_tell: Callable[[], bool]) -> None:
    """Run ``main`` in one of several workers; when one of them fails, all end, and the cause is shown once.

    Call it in every worker, once Detectron2's process groups are there.

    Args:
        host: of the first worker, as the others reach it.
        silence: seconds without a sign of life after which a worker counts as hung.
        stuck: seconds after which an operation that waits for others gives up.
        may_tell: whether nobody else on this machine has told the user yet why the run ends; asked once, before.

    Raises:
        SystemExit: with status 1, when ``main`` fails; its error was shown then.
        RunStopped: what ``main`` raises.
    """
    if comm.get_world_size() == 1:
        main()
        return
    # Of groups that are made from now on, Detectron2's among them; else it is half an hour.
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=stuck)
    machine = comm.get_rank() // comm.get_local_size()
    workers = [
        Worker(*found) for found in comm.all_gather((comm.get_rank(), machine, socket.gethostname(), os.getpid()))
    ]
    for purpose in ("waiting", "ending"):
        _all_workers(purpose)  # all together, while nobody is busy
    lifeline = _connect(host, silence, functools.partial(_leave, workers, may_tell))
    try:
        main()
        wait_for_all()
    except Exception as error:
        _fail(lifeline, workers, may_tell, error)
    except RunStopped as stop:
        if stop.agreed:
            wait_for_all()  # for the parent process ends the others as soon as one has gone
            lifeline.close()
        else:
            lifeline.report(f"stopped: {stop.message}")
            time.sleep(_DELIVERY)
        raise
    lifeline.close()


def describe_workers() -> str:
    """``0: process 4711 on atlas, …``, for the log; the same on every worker."""
    found = comm.all_gather((comm.get_rank(), os.getpid(), socket.gethostname()))
    return ", ".join(f"{rank}: process {process} on {host}" for rank, process, host in found)


def _connect(host: str, silence: float, on_end: Callable[[Ending], None]) -> Lifeline:
    rank, count = comm.get_rank(), comm.get_world_size()
    if rank == 0:
        door, token = open_door(host), secrets.token_hex()
        comm.all_gather((door.getsockname()[1], token))
        peers = admit(door, token=token, count=count - 1)
    else:
        port, token = comm.all_gather(None)[0]
        peers = knock(host, port, token=token, rank=rank)
    return Lifeline(rank=rank, peers=peers, silence=silence, on_end=on_end)


def _fail(lifeline: Lifeline, workers: Sequence[Worker], may_tell: Callable[[], bool], error: Exception) -> None:
    """End the run for all workers; show the error, unless another worker's came first."""
    own = workers[comm.get_rank()]
    reason = f"failed: {type(error).__name__}: {error}"
    if "Timed out" in str(error):
        reason += " (XLEARNER.TIMEOUT.STUCK; another worker did not get on)"
    if _is_consequence(error):
        lifeline.wait(_NEWS)  # ends this process when another one is the cause
    ending = lifeline.report(reason)
    if (ending is None or ending.rank == own.rank) and may_tell():
        if isinstance(error, ConfigError):
            _tell(f"error: {error}")
        else:
            _tell(f"{''.join(traceback.format_exception(error))}error: {own} {reason}{_HINT}")
    time.sleep(_DELIVERY)
    sys.exit(1)


#: What to do next; the cause is in what goes before.
_HINT = "\nThe run ends on all workers; --resume continues it from its last checkpoint."


def _is_consequence(error: Exception) -> bool:
    """Whether an error may just say that another worker has gone: torch has no one type for these."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "onnection"))
    )


def _leave(workers: Sequence[Worker], may_tell: Callable[[], bool], ending: Ending) -> None:
    """End this process because of another worker; one worker of each machine says so, unless the cause does."""
    own, cause = workers[comm.get_rank()], workers[ending.rank]
    if cause == own:
        return  # it says so itself
    setting = " (XLEARNER.TIMEOUT.SILENT)" if ending.kind == "silent" else ""
    known = ending.kind == "failed" and cause.machine == own.machine
    spokesman = min(worker.rank for worker in workers if worker.machine == own.machine and worker != cause)
    if not known and own.rank == spokesman and may_tell():
        _tell(f"error: {cause} {ending.reason}{setting}.{_HINT}")
    time.sleep(_DELIVERY)
    sys.stdout.flush()
    os._exit(1)  # the main thread may wait in an operation that nothing else ends


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
