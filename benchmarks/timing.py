"""Fair comparisons on a machine that does other work as well: all candidates in turn, in one process, many times."""

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xlearner_d2.engine.provenance import git

Run = Callable[[], Any]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class CallCounter(TorchDispatchMode):
    """Counts calls of PyTorch's operators that compute or copy; each of them is launched by itself on a GPU.

    Views, empty memory and answers of the processor are not counted.
    """

    #: Operators that are not marked as views, but start nothing either.
    IDLE = ("empty", "empty_like", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "is_pinned")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view and func.overloadpacket.__name__ not in self.IDLE
        return func(*args, **(kwargs or {}))


def in_turn(runs: Mapping[str, Run], *, rounds: int, warmup: int = 2, by: str = "time") -> dict[str, np.ndarray]:
    """What each run takes in each round, in an order that alternates from round to round.

    Args:
        by: "time" in milliseconds, on a CPU of processor time, which other processes do not add to, on a GPU of wall
            time; or "calls", see :class:`CallCounter`, which are the same in each round, so one is counted.
    """
    measure = {"time": milliseconds, "calls": calls}[by]
    rounds = rounds if by == "time" else 1
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warmup):
        for name in runs if number % 2 else reversed(runs):
            torch.manual_seed(number)  # what is drawn at random, such as proposals, is drawn alike
            found[name].append(measure(runs[name]))
    return {name: np.array(values[warmup:]) for name, values in found.items()}


def milliseconds(run: Run) -> float:
    """Of processor time, on a GPU of wall time."""
    clock = perf_counter if torch.cuda.is_available() else process_time
    synchronize()
    start = clock()
    run()
    synchronize()
    return 1000 * (clock() - start)


def calls(run: Run) -> float:
    """Of PyTorch's operators, see :class:`CallCounter`."""
    with CallCounter() as counter:
        run()
    return float(counter.number)


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Median and quartiles of the ratio of two runs, round by round, and the median of each."""
    low, middle, high = np.percentile(above / below, [25, 50, 75])
    found = {"ratio": middle, "q1": low, "q3": high, "measured": np.median(above), "reference": np.median(below)}
    return {name: round(float(value), 4) for name, value in found.items()}


def peak_bytes(run: Run) -> int:
    """Bytes that PyTorch allocates for ``run`` at its peak, beyond what it had before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([0, *(change for _, change in changes)]).max())


def machine() -> dict[str, str]:
    """What the numbers hold for."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "commit": git("describe", "--always", "--dirty"),
        "processor": f"{len(names) or os.cpu_count()} x {names[0] if names else platform.processor()}",
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "clock": "wall time" if torch.cuda.is_available() else "processor time",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
