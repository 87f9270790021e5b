"""The pre-training runs of a study: the same data and budget, shared out in different ways, one command each."""

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, TextIO

import torch
import yaml

from ..checkpoint.files import write_atomically
from ..config import check_config_file, load_config
from ..engine.explain import results_of
from ..engine.plan import EXPANDED_FILE, STUDENT_FILE, Plan, make_plan
from ..specs import ConfigError, nearest
from .backbones import RANDOM, BackboneSpec, name_problems
from .places import Places
from .runner import starts_no_more, worker_threads
from .suite import digest, read_config

logger = logging.getLogger(__name__)

#: Beside the output of a run: the digest of its settings.
SETTINGS_FILE = "settings.sha256"
KEYS = ("SUITE", "CONFIG", "RUNS", "BACKBONES")


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A study file.

    Attributes:
        suite: path of the transfer suite.
        config: path of the config that all runs start from.
        runs: by name, the overrides of ``config``, as alternating keys and values; ``{NAME}`` in a value is the output
            folder of an earlier run, such as the one whose expanded model is squeezed.
        backbones: by name, ``RUN/FILE``, ``RUN/FILE:TASK`` or "random".
    """

    suite: str
    config: str
    runs: Mapping[str, Sequence[str]]
    backbones: Mapping[str, str]


def load_study(path: str | Path) -> StudySpec:
    """Read a study file.

    Raises:
        ConfigError: with all problems.
    """
    check_config_file(path)
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    problems = [f"{path} lacks the key {key}." for key in KEYS if key not in content]
    problems += [f"{path} has the unknown key {key!r}.{nearest(key, KEYS)}" for key in content if key not in KEYS]
    if not problems:
        problems += _check_content(content, str(path))
    if problems:
        raise ConfigError(problems, what="The study")
    runs = {name: [str(opt) for opt in opts or []] for name, opts in content["RUNS"].items()}
    return StudySpec(suite=content["SUITE"], config=content["CONFIG"], runs=runs, backbones=content["BACKBONES"])


def _check_content(content: Mapping[str, Any], path: str) -> list[str]:
    problems = [
        f"{path}: {key} is {content[key]!r}, but a file is expected."
        for key in ("SUITE", "CONFIG")
        if not Path(str(content[key])).is_file()
    ]
    problems += [
        f"{path}: {key} is {content[key]!r}, but names with what each stands for are expected."
        for key in ("RUNS", "BACKBONES")
        if not isinstance(content[key], dict)
    ]
    if problems:
        return problems
    for number, (name, opts) in enumerate(content["RUNS"].items()):
        if not isinstance(opts, list | None) or len(opts or []) % 2:
            problems.append(f"{path}: RUNS.{name} is {opts!r}, but a list of pairs of key and value is expected.")
            continue
        earlier = list(content["RUNS"])[:number]
        problems += [
            f"{path}: RUNS.{name} needs {{{used}}}, which is no run above it.{nearest(used, earlier)}"
            for used in _needs([str(opt) for opt in opts or []])
            if used not in earlier
        ]
    for name, text in content["BACKBONES"].items():
        problems += [f"{path}: BACKBONES.{name} {wrong}" for wrong in _check_backbone(text, content["RUNS"])]
    return problems


def _check_backbone(text: Any, runs: Mapping[str, Any]) -> list[str]:
    if text == RANDOM:
        return []
    run, _, file = str(text).partition("/")
    if not file:
        return [f"is {text!r}, but RUN/FILE, RUN/FILE:TASK or random is expected."]
    return [] if run in runs else [f"is of the unknown run {run!r}.{nearest(run, runs)}"]


def _needs(opts: Sequence[str]) -> list[str]:
    """The runs whose output a run's overrides name."""
    return sorted({name for value in opts[1::2] for name in re.findall(r"\{(\w+)\}", value)})


def _known(opts: Sequence[str]) -> list[str]:
    """Overrides without those that name files of earlier runs, which need not be there yet, nor what these decide."""
    pairs = list(zip(opts[::2], opts[1::2], strict=True))
    left_out = {key for key, value in pairs if _needs((key, value))}
    known = [item for pair in pairs if pair[0] not in left_out for item in pair]
    return [*known, "XLEARNER.FREEZE", "[]", "XLEARNER.EXTEND_INIT", ""] if "XLEARNER.EXTEND" in left_out else known


def check_runs(study: StudySpec, folder: Path) -> None:
    """See that every run's config and data are as needed, and that the runs will leave the study's backbones.

    Images are not decoded, as each run does so when it starts.

    Args:
        folder: of the study.

    Raises:
        ConfigError: with the problems of all runs and backbones.
    """
    problems, plans = [], {}
    for name, opts in study.runs.items():
        try:
            known = [*_known(opts), "XLEARNER.CHECK_IMAGES", "0", "OUTPUT_DIR", str(folder.absolute())]
            plans[name] = make_plan(load_config(study.config, known), world_size=1)
            if (device := plans[name].cfg.MODEL.DEVICE).startswith("cuda:") and device != "cuda:0":
                wish = "but a study gives its runs the GPUs in turn: set it to cuda, and CUDA_VISIBLE_DEVICES"
                problems.append(f"run {name}: MODEL.DEVICE is {device!r}, {wish}.")
        except ConfigError as error:
            problems += [f"run {name}: {problem}" for problem in error.problems]
    problems += name_problems(map(str, study.backbones), "BACKBONES: ")
    for name, text in study.backbones.items():
        run, _, file = text.partition("/")
        if run in plans:
            problems += [f"BACKBONES.{name} is {text!r}, but {wrong}" for wrong in _check_file(file, run, plans[run])]
    if problems:
        raise ConfigError(problems, what="The study")


def _check_file(text: str, run: str, plan: Plan) -> list[str]:
    """Whether a run leaves ``FILE`` or ``FILE:TASK``; of those in folders below its own nothing is known."""
    file, _, task = text.partition(":")
    left = results_of(plan)
    if file not in left and "/" not in file:
        return [f"the run {run} leaves {' and '.join(left)}; see its XLEARNER.STAGE."]
    tasks = [spec.name for spec in plan.tasks]
    if file == EXPANDED_FILE and task not in tasks:
        return [f"{file} needs :TASK, one of {', '.join(tasks)}."]
    return [f"{file} has no branches, so no :TASK."] if file == STUDENT_FILE and task else []


def check_output(study: StudySpec, seeds: Sequence[int], folder: Path) -> None:
    """See that runs that are there already were made with the same settings.

    Raises:
        ConfigError: naming every run that was not.
    """
    problems = []
    for name, seed in ((name, seed) for seed in seeds for name in study.runs):
        path = _output(folder, name, seed) / SETTINGS_FILE
        if path.is_file() and path.read_text(encoding="utf-8").strip() != _settings(study, name):
            problems.append(f"{path.parent} was made with other settings. Remove it, or set another --output.")
    if problems:
        raise ConfigError(problems, what="The output")


def _settings(study: StudySpec, name: str) -> str:
    """SHA-256 of what a run is told, the configs of its heads included, and of what those were told that it needs."""
    opts = list(study.runs[name])
    sources = load_config(study.config, _known(opts)).XLEARNER.SOURCES
    heads = {source: read_config(record.CONFIG) for source, record in sources.items() if record is not None}
    needed = {other: _settings(study, other) for other in _needs(opts)}
    return digest({"config": read_config(study.config), "heads": heads, "opts": opts, "needs": needed})


def backbones_of(study: StudySpec, folder: Path, *, without: Collection[str] = ()) -> list[BackboneSpec]:
    """The study's backbones, in the files its runs leave below ``folder``, but for those of the runs ``without``."""
    found = []
    for name, text in study.backbones.items():
        if text.partition("/")[0] in without:
            continue
        place, _, task = text.partition(":")
        path = RANDOM if text == RANDOM else str(folder / "runs" / "seed{seed}" / place)
        found.append(BackboneSpec(name=name, path=path, task=task))
    return found


def run_pretraining(
    study: StudySpec, seeds: Sequence[int], folder: Path, *, places: Places, meanwhile: Callable[[], object]
) -> list[tuple[str, int]]:
    """Run what is not finished, several at a time; a run that was stopped continues from its last checkpoint.

    Args:
        meanwhile: called when there are places that no run waits for while others go on.

    Returns:
        name and seed of the runs that failed; the log of each is beside its output.
    """
    work = [(name, seed) for seed in seeds for name in study.runs]
    left = [(name, seed) for name, seed in work if not _finished(folder, name, seed)]
    logger.info(f"{len(work)} pre-training runs, of which {len(work) - len(left)} are finished.")
    results: dict[tuple[str, int], Future[int]] = {}
    waiting, all_have_begun = set(left), Event()

    def begin(name: str, seed: int) -> None:
        waiting.discard((name, seed))
        if not waiting:
            all_have_begun.set()

    def run(name: str, seed: int) -> int:
        try:
            return start(name, seed)
        finally:
            begin(name, seed)  # whatever happened, nobody waits for it any more

    def start(name: str, seed: int) -> int:
        # A run starts after those that it needs, which stand above it, so waiting for them never waits for itself.
        needed = [results[other, seed] for other in _needs(study.runs[name]) if (other, seed) in results]
        if any(future.result() for future in needed):
            logger.error(f"Run {name}, seed {seed}: not started, as a run that it needs failed.")
            return 1
        with places.take() as place:
            begin(name, seed)
            return _run(study, name, seed, folder, jobs=places.number, device=_device(place))

    with ThreadPoolExecutor(places.number) as pool, starts_no_more(pool, places):
        for item in left:
            results[item] = pool.submit(run, *item)
        if left:
            all_have_begun.wait()
            while going_on := [future for future in results.values() if not future.done()]:
                if len(going_on) < places.number:
                    meanwhile()
                wait(going_on, return_when=FIRST_COMPLETED)
        return [item for item, future in results.items() if future.result()]


def unfinished_runs(study: StudySpec, seed: int, folder: Path) -> list[str]:
    """Names of the runs that have not left all that they will."""
    return [name for name in study.runs if not _finished(folder, name, seed)]


def _output(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"seed{seed}" / name


def _finished(folder: Path, name: str, seed: int) -> bool:
    return (_output(folder, name, seed) / "metrics.json").is_file()


def _device(place: int) -> dict[str, str]:
    """Environment of the runs of a place: a GPU, if there are any."""
    if not torch.cuda.is_available():
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = seen.split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}


def _run(study: StudySpec, name: str, seed: int, folder: Path, *, jobs: int, device: Mapping[str, str]) -> int:
    """One run in a process of its own; its exit code."""
    output = _output(folder, name, seed)
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "xlearner_d2", "train", "--config-file", study.config]
    command += ["--resume", *_filled(study.runs[name], folder, seed), "SEED", str(seed), "OUTPUT_DIR", str(output)]
    threads = worker_threads(jobs)
    # The run inherits the lock, and holds it even when this process is killed: the next one then waits for its end.
    with (output / "lock").open("w") as lock, (output / "stdout.txt").open("a", encoding="utf-8") as log:
        _acquire(lock)
        if _finished(folder, name, seed):
            return 0
        (output / SETTINGS_FILE).write_text(_settings(study, name) + "\n", encoding="utf-8")
        logger.info(f"Run {name}, seed {seed}: started, its log is {log.name}.")
        started = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **device}
        code = subprocess.run(
            command, stdout=log, stderr=log, env=environment, check=False, pass_fds=(lock.fileno(),)
        ).returncode
        seconds = time.monotonic() - started
        _add_cost(output / "cost.json", seconds, threads)
    how = "done" if code == 0 else f"failed, see {log.name}"
    logger.info(f"Run {name}, seed {seed}: {how} after {timedelta(seconds=round(seconds))}.")
    return code


def _filled(opts: Sequence[str], folder: Path, seed: int) -> Iterator[str]:
    """Overrides with the output folders of earlier runs in place of their names."""
    for opt in opts:
        yield re.sub(r"\{(\w+)\}", lambda found: str(_output(folder, found[1], seed)), opt)


def _acquire(lock: TextIO) -> None:
    """Wait until no other process holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info(f"Waiting for another process that holds {lock.name}.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _add_cost(path: Path, seconds: float, threads: int) -> None:
    """Add to the time that earlier attempts took; that of one that was killed from outside is not known."""
    before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else 0
    write_atomically(json.dumps({"seconds": before + round(seconds), "threads": threads}) + "\n", path)
