"""How workers notice each other's end: each keeps a connection to the first one, which tells the others.

A collective operation does not do: it fails only while it runs, without saying who is missing, and it waits long for a
worker that hangs, as evaluation by one worker takes long, too. Here the kernel closes the connection of a process that
dies, however it does, and gives up that of a machine that went away; and each worker gives signs of life from a thread
of its own, whatever else it does.
"""

import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait

#: Seconds after which the kernel gives up a machine that does not answer, and after which the start of a run does.
UNREACHABLE, CONNECTING = 30, 60
_LONGEST_MESSAGE = 1 << 16


@dataclass(frozen=True)
class Ending:
    """Why a run ends.

    Attributes:
        rank: the worker that is the cause.
        kind: ``failed`` (it said so itself), ``gone`` (its connection broke) or ``silent``.
        reason: what follows "Worker 3 …" in a message.
    """

    rank: int
    kind: str
    reason: str


class Lifeline:
    """Watches the other workers from a thread of its own, until one of them ends the run or this one is done.

    Args:
        rank: of this worker.
        peers: connections by rank: of the first worker to all others, of these to the first.
        silence: seconds without a sign of life after which a peer counts as hung.
        on_end: called once, from any thread, when a worker ends the run; this worker's own end included.
    """

    def __init__(self, *, rank: int, peers: Mapping[int, Connection], silence: float, on_end: Callable[[Ending], None]):
        self._rank = rank
        self._peers = dict(peers)
        self._silence = silence
        self._on_end = on_end
        self._lock = threading.RLock()
        self._closing = False
        self._ended = threading.Event()
        self._ending: Ending | None = None
        # A loader's process would keep the connections of a worker that is killed open.
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def report(self, reason: str, *, patience: float = 10.0) -> Ending | None:
        """Say that this worker fails, and learn what ended the run: this, or the end of another that came before.

        Returns:
            None when the first worker does not answer within ``patience`` seconds.
        """
        ending = Ending(self._rank, "failed", reason[: _LONGEST_MESSAGE // 8])
        if self._rank == 0 or not self._send(0, {"type": "end", **asdict(ending)}):
            self._decide(ending)
        return self.wait(patience)

    def wait(self, seconds: float) -> Ending | None:
        """What ended the run, if anything does so within some seconds."""
        self._ended.wait(seconds)
        return self._ending

    def close(self) -> None:
        """Leave without ending the run for the others."""
        self._closing = True  # from now on a connection that breaks is one that the other end has closed as well
        with self._lock:
            for rank in list(self._peers):
                self._send(rank, {"type": "bye"})
                self._drop(rank)

    def _watch(self) -> None:
        interval = min(5.0, self._silence / 4)
        heard = dict.fromkeys(self._peers, time.monotonic())
        pulse = 0.0
        while (peers := dict(self._peers)) and self._ending is None:
            try:
                ready = wait(list(peers.values()), interval)
            except OSError:  # closed meanwhile
                continue
            now = time.monotonic()
            for rank in [rank for rank, peer in peers.items() if peer in ready]:
                heard[rank] = now
                self._read(rank)
            if now - pulse >= interval:
                pulse = now
                for rank in list(self._peers):
                    self._send(rank, {"type": "alive"})
            for rank in [rank for rank in self._peers if now - heard[rank] > self._silence]:
                if self._has_news(rank):  # it was this worker that stood still
                    heard[rank] = now
                    self._read(rank)
                else:
                    self._decide(Ending(rank, "silent", f"gave no sign of life for {self._silence:g} s"))

    def _has_news(self, rank: int) -> bool:
        try:
            return self._peers[rank].poll(0)
        except (KeyError, OSError):  # closed meanwhile
            return False

    def _read(self, rank: int) -> None:
        try:
            message = json.loads(self._peers[rank].recv_bytes(_LONGEST_MESSAGE))
        except KeyError:
            return
        except (EOFError, OSError):
            self._drop(rank)
            if self._closing:
                return
            self._decide(Ending(rank, "gone", "is gone: it was killed, or its machine or the connection to it failed"))
            return
        match message.pop("type"):
            case "end":
                self._decide(Ending(**message))
            case "bye":
                self._drop(rank)

    def _decide(self, ending: Ending) -> None:
        with self._lock:
            if self._ending is not None:
                return
            self._ending = ending
            if self._rank == 0:
                for rank in list(self._peers):
                    self._send(rank, {"type": "end", **asdict(ending)})
        self._ended.set()
        self._on_end(ending)

    def _send(self, rank: int, message: Mapping[str, object]) -> bool:
        with self._lock:
            try:
                self._peers[rank].send_bytes(json.dumps(message).encode())
            except (KeyError, OSError):  # its end shows when it is read from
                return False
            return True

    def _drop(self, rank: int) -> None:
        with self._lock:
            peer = self._peers.pop(rank, None)
            if peer is not None:
                peer.close()

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers = {}


def open_door(host: str) -> socket.socket:
    """A listening socket of the first worker, whom the others know as ``host``, on a free port."""
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def admit(door: socket.socket, *, token: str, count: int, seconds: float = CONNECTING) -> dict[int, Connection]:
    """Wait for ``count`` workers that know the token; return their connections by rank, and close the door.

    Raises:
        TimeoutError: when one does not come.
    """
    peers: dict[int, Connection] = {}
    deadline = time.monotonic() + seconds
    with door:
        while len(peers) < count:
            door.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                guest, _ = door.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count + 1)) - set(peers))
                raise TimeoutError(f"workers {missing} did not connect to the first one within {seconds:g} s") from None
            _admit_one(_connection(guest), token, peers)
    return peers


def _admit_one(guest: Connection, token: str, peers: dict[int, Connection]) -> None:
    try:
        greeting = json.loads(guest.recv_bytes(_LONGEST_MESSAGE)) if guest.poll(5) else {}
    except (EOFError, OSError, ValueError):
        greeting = {}
    if hmac.compare_digest(str(greeting.get("token")).encode(), token.encode()):
        peers[int(greeting["rank"])] = guest
    else:  # a stranger that found the port
        guest.close()


def knock(host: str, port: int, *, token: str, rank: int) -> dict[int, Connection]:
    """Connect to the first worker."""
    peer = _connection(socket.create_connection((host, port), timeout=CONNECTING))
    peer.send_bytes(json.dumps({"token": token, "rank": rank}).encode())
    return {0: peer}


def _connection(opened: socket.socket) -> Connection:
    """Whole messages over a socket that breaks when the other machine does not answer for some time."""
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", UNREACHABLE // 3),
        ("TCP_KEEPINTVL", UNREACHABLE // 6),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", UNREACHABLE * 1000),  # Linux: while something is under way
    ):
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(opened.detach())
