"""Workers notice each other's end, whatever it is, and nothing else; in forked processes."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
from processes import LONG, Processes

from xlearner_d2.engine import lifeline
from xlearner_d2.engine.lifeline import Lifeline, admit, knock, open_door

TOKEN = "a shared secret"


@pytest.fixture
def run(tmp_path):
    """Three workers that do as they are told; returns what each one learned: by rank, [(cause, kind)] or nothing."""

    def run(*deeds, silence=60.0, waited=(0, 1, 2)):
        door = open_door("127.0.0.1")
        port = door.getsockname()[1]

        def work(rank):
            learned = []
            count = len(deeds) - 1
            peers = (
                admit(door, token=TOKEN, count=count) if rank == 0 else knock("localhost", port, token=TOKEN, rank=rank)
            )
            door.close()
            line = Lifeline(rank=rank, peers=peers, silence=silence, on_end=learned.append)
            try:
                deeds[rank](line)
            finally:
                (tmp_path / f"{rank}.json").write_text(
                    json.dumps([(end.rank, end.kind, end.reason) for end in learned])
                )

        processes = Processes(work, len(deeds), tmp_path)
        door.close()
        codes = dict(zip(waited, processes.wait(*waited), strict=True))
        assert None not in codes.values(), processes.errors()
        found = {rank: tmp_path / f"{rank}.json" for rank in waited}
        return {
            rank: [tuple(end) for end in json.loads(file.read_text())] for rank, file in found.items() if file.exists()
        }

    return run


def listen(line):
    assert line.wait(LONG) is not None


def leave(line):
    line.close()


def send_itself(number):
    def deed(line):
        os.kill(os.getpid(), number)
        time.sleep(LONG)

    return deed


GONE = "is gone: it was killed, or its machine or the connection to it failed"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_others_learn_who_was_killed(run, victim):
    deeds = [listen, listen, listen]
    deeds[victim] = send_itself(signal.SIGKILL)
    end = (victim, "gone", GONE)
    assert run(*deeds) == {rank: [end] for rank in range(3) if rank != victim}


def test_a_process_that_a_killed_worker_has_forked_keeps_nothing_open(run, tmp_path):
    def fork_and_die(line):
        child = os.fork()
        if child:
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LONG)
        os._exit(0)

    try:
        assert run(listen, listen, fork_and_die, waited=(0, 1)) == {rank: [(2, "gone", GONE)] for rank in (0, 1)}
        os.kill(int((tmp_path / "child").read_text()), 0)  # it is still there
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_worker_is_hung_after_some_silence(run, victim):
    deeds = [listen, listen, listen]
    deeds[victim] = send_itself(signal.SIGSTOP)
    others = tuple(rank for rank in range(3) if rank != victim)
    end = (victim, "silent", "gave no sign of life for 1 s")
    assert run(*deeds, silence=1, waited=others) == {rank: [end] for rank in others}


def test_a_busy_worker_is_not_hung(run):
    def work_for_long(line):
        time.sleep(1.5)
        line.close()

    assert run(work_for_long, work_for_long, work_for_long, silence=0.5) == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("first", [0, 1])
def test_a_failure_is_everyones_end(run, first):
    def fail(line):
        assert line.report("failed: ValueError: no").rank == first

    deeds = [listen, listen, listen]
    deeds[first] = fail
    assert run(*deeds) == {rank: [(first, "failed", "failed: ValueError: no")] for rank in range(3)}


def test_of_several_failures_all_take_the_same_for_the_cause(run):
    def fail(line):
        assert line.report("failed") is not None

    found = run(fail, fail, fail)
    assert len({tuple(ends) for ends in found.values()}) == 1
    assert [len(ends) for ends in found.values()] == [1, 1, 1]


def test_those_who_leave_end_nothing_and_the_others_are_still_watched(run):
    def die_later(line):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    assert run(listen, leave, die_later) == {0: [(2, "gone", GONE)], 1: []}
    assert run(leave, leave, leave) == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("spoke", [True, False])
def test_who_stood_still_itself_reads_before_it_takes_another_for_silent(monkeypatch, spoke):
    """As when another thread keeps the interpreter: what was said meanwhile has not been read yet."""
    monkeypatch.setattr(lifeline, "wait", lambda peers, seconds: time.sleep(0.5) or [])
    own, other = multiprocessing.Pipe()
    learned = []
    for _ in range(100 if spoke else 0):
        other.send_bytes(json.dumps({"type": "alive"}).encode())
    line = Lifeline(rank=0, peers={1: own}, silence=0.3, on_end=learned.append)
    deadline = time.monotonic() + (1.2 if spoke else LONG)
    while not learned and time.monotonic() < deadline:
        time.sleep(0.05)
    line.close()
    assert [end.kind for end in learned] == ([] if spoke else ["silent"])


def test_strangers_are_turned_away():
    door = open_door("127.0.0.1")
    port = door.getsockname()[1]
    silent = socket.create_connection(("127.0.0.1", port))
    silent.close()
    found = {}
    admitting = threading.Thread(target=lambda: found.update(admit(door, token=TOKEN, count=1)))
    admitting.start()
    knock("127.0.0.1", port, token="a guess", rank=1)
    knock("127.0.0.1", port, token=TOKEN, rank=1)
    admitting.join(LONG)
    assert list(found) == [1]


def test_a_worker_that_does_not_come_is_named():
    door = open_door("127.0.0.1")
    knock("127.0.0.1", door.getsockname()[1], token=TOKEN, rank=1)
    with pytest.raises(TimeoutError, match=r"workers \[2, 3\] did not connect to the first one within 0.2 s"):
        admit(door, token=TOKEN, count=3, seconds=0.2)
