"""What several workers do when one fails, dies, hangs or takes long; in forked processes with gloo."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from processes import LONG, Processes

from xlearner_d2.checkpoint.training import TrainingCheckpointer
from xlearner_d2.engine.stopping import RunStopped
from xlearner_d2.engine.workers import describe_workers, patient_group, wait_for_all, work
from xlearner_d2.specs import ConfigError

#: Seconds that a busy machine may take to get on from one operation of all workers to the next; and more than these.
STUCK, LONGER = 3, 5


@pytest.fixture
def run(tmp_path):
    """Two workers of one machine, or of a machine each; returns their exit codes and all that they said."""

    def run(main, *, silence=60.0, stuck=LONG, machines=1, told=False, waited=()):
        def start(rank):
            init = f"file://{tmp_path}/meeting"
            dist.init_process_group("gloo", init, timedelta(seconds=stuck), world_size=2, rank=rank)
            comm.create_local_process_group(2 // machines)
            work(lambda: main(rank), host="127.0.0.1", silence=silence, stuck=stuck, may_tell=lambda: not told)

        processes = Processes(start, 2, tmp_path)
        return processes.wait(*waited), processes.errors()

    return run


def all_reduce():
    dist.all_reduce(torch.ones(3))


HINT = "The run ends on all workers; --resume continues it from its last checkpoint.\n"


def test_success(run, tmp_path):
    def main(rank):
        all_reduce()
        (tmp_path / f"{rank}.out").write_text(describe_workers())

    assert run(main) == ([0, 0], "")
    first, second = ((tmp_path / f"{rank}.out").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("0: process ")
    assert ", 1: process " in first


@pytest.mark.parametrize("cause", [0, 1])
def test_a_config_error_of_one_worker_shows_once(run, cause):
    def main(rank):
        if rank == cause:
            raise ConfigError(["There is no such file."])
        all_reduce()

    codes, said = run(main)
    assert codes == [1, 1]
    assert said.count("There is no such file.") == 1
    assert said.startswith("error: ")
    assert "Traceback" not in said


def test_an_error_of_all_workers_shows_once(run):
    def main(rank):
        raise FloatingPointError("no number")

    codes, said = run(main)
    assert codes == [1, 1]
    assert said.count("Traceback") == 1
    assert said.count("failed: FloatingPointError: no number") == 1
    assert said.endswith(HINT)


def test_each_machine_learns_of_a_failure_on_another_one(run):
    def main(rank):
        if rank == 1:
            raise FloatingPointError("no number")
        all_reduce()

    codes, said = run(main, machines=2)
    assert codes == [1, 1]
    assert said.count("Traceback") == 1
    assert said.count("error: Worker 1 (process") == 2


@pytest.mark.parametrize("machines", [1, 2])
def test_a_killed_worker_is_named_by_the_other(run, machines):
    def main(rank):
        while True:
            all_reduce()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    codes, said = run(main, machines=machines)
    assert codes == [1, -signal.SIGKILL]
    assert said.startswith("error: Worker 1 (process ")
    assert said.count("error") == 1
    assert "is gone: it was killed, or its machine or the connection to it failed" in said
    assert said.endswith(HINT)


def test_what_the_user_knows_is_not_said_again(run):
    def main(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce()

    assert run(main, told=True) == ([1, -signal.SIGKILL], "")


def test_a_hung_worker_ends_the_other(run):
    def main(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        all_reduce()

    codes, said = run(main, silence=1, waited=[0])
    assert codes == [1]
    assert "gave no sign of life for 1 s (XLEARNER.TIMEOUT.SILENT)" in said
    assert said.count("error: Worker 1") == 1


def test_a_worker_that_does_not_get_on_ends_the_other(run):
    def main(rank):
        if rank == 1:
            time.sleep(LONG)
        all_reduce()

    codes, said = run(main, stuck=1)
    assert codes == [1, 1]
    assert "error: Worker 0" in said
    assert "(XLEARNER.TIMEOUT.STUCK; another worker did not get on)" in said
    assert said.count("Traceback") == 1


def test_work_that_one_does_for_all_may_take_long(run):
    def main(rank):
        if rank == 0:
            time.sleep(LONGER)
        wait_for_all()
        all_reduce()

    assert run(main, stuck=STUCK) == ([0, 0], "")


def test_saving_may_take_long(run, tmp_path):
    class Large:
        def state_dict(self):
            time.sleep(LONGER * comm.is_main_process())
            return {}

    def main(rank):
        model = torch.nn.Linear(1, 1)
        TrainingCheckpointer(model, str(tmp_path / "saved"), group=patient_group(), large=Large()).save("model_0")
        all_reduce()

    (tmp_path / "saved").mkdir()
    assert run(main, stuck=STUCK) == ([0, 0], "")
    assert (tmp_path / "saved/model_0.pth").is_file()


def test_an_exit_that_all_have_agreed_on_is_no_failure(run):
    def main(rank):
        time.sleep(rank)
        raise RunStopped("", code=7, agreed=True)

    assert run(main) == ([7, 7], "")
