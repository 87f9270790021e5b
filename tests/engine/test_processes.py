"""Real processes: several workers, and a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xlearner_d2.checkpoint.load import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def start(project, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(project.file), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DETECTRON2_DATASETS": str(project.root / "data")},
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
