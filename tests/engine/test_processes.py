"""Real processes: several workers, and a run that is killed."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import LONG

from xlearner_d2.checkpoint.load import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def start(project, *arguments, before=(), **options):
    return subprocess.Popen(
        [sys.executable, *before, str(ROOT / "train_net.py"), "--config-file", str(project.file), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DETECTRON2_DATASETS": str(project.root / "data")},
        **options,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def test_two_workers_train_squeeze_and_evaluate_like_one(project):
    """Both stages on two processes; what they made is then evaluated by one process, with the same result."""
    finish(start(project, "--num-gpus", 2))
    out = project.root / "out"
    together = json.loads((out / "metrics.json").read_text())
    assert (out / "student_d2.pth").is_file()
    alone = project.run(eval_only=True)
    for source, found in together["expanded"].items():
        for name, metrics in found.items():
            assert metrics == pytest.approx(alone["expanded"][source][name]), source


def test_a_batch_that_workers_cannot_share_is_refused(project):
    process = start(project, "--num-gpus", 2, "XLEARNER.SOURCES.pics.IMS_PER_BATCH", 3)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "XLEARNER.SOURCES.pics.IMS_PER_BATCH is 3, but a positive number that 2 workers can share evenly" in output
    assert "Traceback" not in output
    assert not (project.root / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_is_one_to_the_run(project, number):
    """As from a terminal or a scheduler: those that read images are needed until the step is finished."""
    without_evaluation(project, steps=100_000)
    process = start(project, "XLEARNER.STAGE", "expand", "DATALOADER.NUM_WORKERS", 2, start_new_session=True)
    wait_for_checkpoint(project, "expand", process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=LONG)[0]
    assert process.returncode == 128 + number, output[-3000:]
    assert f"Stopped by {number.name} after step " in output
    assert "Traceback" not in output


def test_a_signal_to_the_process_that_started_workers_reaches_them(project):
    without_evaluation(project, steps=100_000)
    process = start(project, "--num-gpus", 2, "XLEARNER.STAGE", "expand")
    wait_for_checkpoint(project, "expand", process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LONG)[0]
    assert process.returncode == 128 + signal.SIGTERM, output[-3000:]
    assert output.count("Stopped by SIGTERM after step ") == 1
    assert "Traceback" not in output


def test_a_killed_run_goes_on_where_it_was(project):
    """SIGKILL once a checkpoint is there, then --resume: the weights are those of a run that was left alone."""
    project.content["SOLVER"]["MAX_ITER"] = 12
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)
    project.run("OUTPUT_DIR", project.root / "alone", "XLEARNER.STAGE", "expand")
    process = start(project, "XLEARNER.STAGE", "expand")
    first = project.root / "out/expand/last_checkpoint"
    deadline = time.monotonic() + 240
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists()
    assert not (project.root / "out/expanded.pth").exists(), "the run ended before it could be killed"
    project.run("XLEARNER.STAGE", "expand", resume=True)
    states = [read_checkpoint(project.root / folder / "expanded.pth")["model"] for folder in ("alone", "out")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def without_evaluation(project, *, steps):
    project.content["SOLVER"]["MAX_ITER"] = steps
    for record in project.content["XLEARNER"]["SOURCES"].values():
        record["TEST"] = []
    project.content["XLEARNER"]["PROBES"] = {}
    project.write(project.content)


def wait_for_checkpoint(project, stage, *processes):
    first = project.root / f"out/{stage}/last_checkpoint"
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.05)


def kill_worker(project, rank, *processes):
    """SIGKILL one worker of a run as soon as there is a checkpoint."""
    wait_for_checkpoint(project, "expand", *processes)
    log = project.root / "out/log.txt"
    os.kill(int(re.search(rf"Workers: .*\b{rank}: process (\d+) on", log.read_text())[1]), signal.SIGKILL)


def test_two_machines_end_when_a_worker_of_one_is_killed(project):
    """Two launches on this machine; each says once which worker it was."""
    without_evaluation(project, steps=100_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    machines = [
        start(project, "--num-machines", 2, "--machine-rank", rank, "--dist-url", url, "XLEARNER.STAGE", "expand")
        for rank in range(2)
    ]
    kill_worker(project, 1, *machines)
    said = [process.communicate(timeout=300)[0] for process in machines]
    assert [process.returncode for process in machines] == [1, 1]
    assert [text.count("error: Worker 1 (process ") for text in said] == [1, 1], said
    assert (
        "is gone: it was killed, or its machine or the connection to it failed.\nThe run ends on all workers" in said[0]
    )
    assert "was ended by SIGKILL, perhaps for want of memory.\nThe run ends on all workers" in said[1]
    assert "Traceback" not in "".join(said)


def test_torchrun_starts_again_where_a_worker_was_killed(project, monkeypatch):
    # Or the new workers find the addresses of the old ones in the agent's store, now and then before the new ones.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    without_evaluation(project, steps=12)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = start(project, "--resume", "XLEARNER.STAGE", "expand", before=torchrun)
    kill_worker(project, 1, process)
    output = finish(process)
    log = (project.root / "out/log.txt").read_text()
    assert log.count("Workers: 0: process ") == 2
    assert "Resuming" in log, output[-3000:]
    assert (project.root / "out/expanded.pth").is_file()


def test_torchrun_that_is_stopped_saves_first(project):
    """SIGTERM to torchrun itself, as from a scheduler whose time is up, in the squeeze; the next start ends the run.

    It sends the signal on to the processes that read images, too.
    """
    without_evaluation(project, steps=4)
    arguments = ("--resume", "XLEARNER.SQUEEZE.SOLVER.MAX_ITER", 30, "DATALOADER.NUM_WORKERS", 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(project, *arguments, before=torchrun)
    wait_for_checkpoint(project, "squeeze", process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    stopped = re.search(r"Stopped by SIGTERM after step (\d+) of 30", output)
    assert stopped, output[-3000:]
    assert not (project.root / "out/student_d2.pth").exists()
    finish(start(project, *arguments, before=torchrun))
    assert f"Resuming after step {stopped[1]}, " in (project.root / "out/log.txt").read_text()
    assert (project.root / "out/student_d2.pth").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-machines", 2], "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        (["--num-gpus", 2, "--machine-rank", 1], "--machine-rank is 1, but a number from 0 to 0 is expected"),
    ],
)
def test_options_that_do_not_fit(project, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(project.file), *map(str, arguments)])
    with pytest.raises(SystemExit, match=re.escape(message)):
        runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
