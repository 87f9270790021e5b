"""How a run starts: in this process, in several that Detectron2's ``launch`` starts here, or in one of torchrun's."""

import argparse
import functools
import logging
import multiprocessing
import multiprocessing.synchronize
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..config import load_config
from ..settings import usable_device
from ..specs import ConfigError
from .memory import keep_freed_memory
from .plan_checks import check_device
from .run import check_same_data, keeping_warnings, run, validate
from .scaling import check_timeouts
from .stopping import RunStopped, name_of, passing_on_signals
from .workers import end_with_parent, wait_for_all, work


def start(args: argparse.Namespace) -> None:
    """Do what the command line asks for, on as many workers as it asks for, or as torchrun has started.

    Raises:
        ConfigError: before any work starts.
        SystemExit: when a worker ended with an error; it was shown then.
    """
    if dist.is_torchelastic_launched():
        _start_in_torchrun(args)
        return
    cfg = load_config(args.config_file, args.opts)
    if problems := [
        f"--{name.replace('_', '-')} is {number}, but at least 1 is expected; MODEL.DEVICE says whether on a GPU."
        for name in ("num_gpus", "num_machines")
        if (number := getattr(args, name)) < 1
    ]:
        raise ConfigError(problems, what="The command line")
    count = args.num_gpus * args.num_machines
    if args.dry_run:
        print(validate(cfg, args, world_size=count)[1])
    elif count == 1:
        _run(args)
    else:
        _check_devices(cfg, args.num_gpus, "--num-gpus")
        _check_address(args)
        # Here, because each worker would list the same problems; and decoding images once is enough.
        told = _validate(args, count) if usable_device(cfg) == "cpu" else _validate_apart(args, count)
        args.opts = [*args.opts, "XLEARNER.CHECK_IMAGES", "0"]
        _launch(cfg, args, told)


def _validate(args: argparse.Namespace, count: int) -> list[logging.LogRecord]:
    """Validate, and return the warnings."""
    with keeping_warnings() as warnings:
        validate(load_config(args.config_file, args.opts), args, world_size=count)
    return warnings


def _validate_apart(args: argparse.Namespace, count: int) -> list[logging.LogRecord]:
    """In a process of its own, as one that has used a GPU keeps some of its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell_problems, args=(theirs, args, count))
    process.start()
    theirs.close()
    try:
        found: ConfigError | list[logging.LogRecord] = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"by {name_of(-code)}, perhaps for want of memory" if code < 0 else f"with exit code {code}"
        sys.exit(f"error: The check before the run was ended {how}.")
    process.join()
    if isinstance(found, ConfigError):
        raise found
    return found


def _tell_problems(pipe: Connection, args: argparse.Namespace, count: int) -> None:
    end_with_parent()
    try:
        pipe.send(_validate(args, count))
    except ConfigError as error:
        pipe.send(error)


def _launch(cfg: CfgNode, args: argparse.Namespace, told: Sequence[logging.LogRecord]) -> None:
    if usable_device(cfg) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or Detectron2 would choose the backend of GPUs
    first = multiprocessing.get_context("spawn").Semaphore(1)  # who has it tells the user why the run ends
    try:
        with passing_on_signals():
            launch(
                _launched,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, told, float(cfg.XLEARNER.TIMEOUT.SILENT), float(cfg.XLEARNER.TIMEOUT.STUCK), first),
                timeout=timedelta(seconds=cfg.XLEARNER.TIMEOUT.STUCK),
            )
    except ProcessRaisedException as error:  # before the workers knew each other
        last = str(error).strip().splitlines()[-1]
        sys.exit(f"error: The workers could not be joined at {args.dist_url}: {last}")
    except ProcessExitedException as error:
        if error.signal_name is None or not first.acquire(block=False):
            sys.exit(error.exit_code if error.signal_name is None else 1)
        rank = args.machine_rank * args.num_gpus + error.error_index
        who = f"Worker {rank} (process {error.error_pid} on {socket.gethostname()})"
        why = ", perhaps for want of memory" if error.signal_name == "SIGKILL" else ""
        sys.exit(
            f"error: {who} was ended by {error.signal_name}{why}.\n"
            "The run ends on all workers; --resume continues it from its last checkpoint."
        )


def _launched(
    args: argparse.Namespace,
    told: Sequence[logging.LogRecord],
    silence: float,
    stuck: float,
    first: multiprocessing.synchronize.Semaphore,
) -> None:
    """One worker that Detectron2 has started."""
    host = "127.0.0.1" if args.num_machines == 1 else urlsplit(args.dist_url).hostname or socket.gethostname()
    may_tell = functools.partial(first.acquire, block=False)
    work(functools.partial(_run, args, told), host=host, silence=silence, stuck=stuck, may_tell=may_tell)


def _start_in_torchrun(args: argparse.Namespace) -> None:
    """One worker that torchrun has started; the first of each machine speaks for it until all are joined."""
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        cfg = load_config(args.config_file, args.opts)
        if (args.num_gpus, args.num_machines) != (1, 1):
            raise ConfigError(["torchrun decides the number of workers: leave --num-gpus and --num-machines out."])
        if problems := check_timeouts(cfg):
            raise ConfigError(problems)
        on_gpu = _check_devices(cfg, local_size, "--nproc-per-node")
    except ConfigError as error:
        sys.exit(f"error: {error}" if local_rank == 0 else 1)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=cfg.XLEARNER.TIMEOUT.STUCK))
    comm.create_local_process_group(local_size)
    if local_rank:  # decoding images once on each machine is enough
        args.opts = [*args.opts, "XLEARNER.CHECK_IMAGES", "0"]
    work(
        functools.partial(_dry_run if args.dry_run else _run, args),
        host=os.environ["MASTER_ADDR"],
        silence=cfg.XLEARNER.TIMEOUT.SILENT,
        stuck=cfg.XLEARNER.TIMEOUT.STUCK,
        may_tell=lambda: True,
    )
    dist.destroy_process_group()


def _dry_run(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    with keeping_warnings(show=comm.get_local_rank() == 0):
        plan, description = validate(cfg, args, world_size=comm.get_world_size())
    wait_for_all()  # which has the patience that decoding images takes, as one worker of a machine does
    check_same_data(plan)
    if comm.is_main_process():
        print(description)


def _run(args: argparse.Namespace, told: Sequence[logging.LogRecord] = ()) -> None:
    """The whole run of one worker; ``told`` are warnings that were shown already."""
    if sys.platform == "linux":
        # A worker that was spawned would spawn its loader's processes, each of which imports everything again.
        multiprocessing.set_start_method("fork", force=True)
    try:
        cfg = load_config(args.config_file, args.opts)
        device = usable_device(cfg)
        if problems := check_device(device):
            raise ConfigError(problems)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        if device == "cpu":
            keep_freed_memory()
        run(cfg, args, told=told)
    except RunStopped as stop:
        if stop.message:
            print(f"error: {stop.message}", file=sys.stderr, flush=True)
        raise


def _check_address(args: argparse.Namespace) -> None:
    if args.num_machines > 1 and args.dist_url == "auto":
        first = "tcp://HOST:PORT, alike on all machines, where HOST is that of --machine-rank 0"
        raise ConfigError([f"--num-machines {args.num_machines} needs --dist-url {first}."])
    if not 0 <= args.machine_rank < args.num_machines:
        wish = f"a number from 0 to {args.num_machines - 1} is expected with --num-machines {args.num_machines}"
        raise ConfigError([f"--machine-rank is {args.machine_rank}, but {wish}."])


def _check_devices(cfg: CfgNode, count: int, option: str) -> bool:
    """Whether ``count`` workers of this machine run on GPUs.

    Raises:
        ConfigError: when it has too few, or they would all use one.
    """
    device = usable_device(cfg)
    if device == "cpu":
        return False
    if count > 1 and device != "cuda":
        raise ConfigError([f"MODEL.DEVICE is {device!r}, but {count} workers need a GPU each: set it to cuda."])
    if count > torch.cuda.device_count():
        raise ConfigError([f"{option} is {count}, but this machine has {torch.cuda.device_count()} usable GPUs."])
    return True
