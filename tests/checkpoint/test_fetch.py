"""What is fetched is what its checksum says, and only a path that asks for it touches the network."""

import functools
import hashlib
import logging
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from xlearner_d2.checkpoint.fetch import local_file
from xlearner_d2.checkpoint.load import read_checkpoint
from xlearner_d2.specs import ConfigError


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address and SHA-256 of a checkpoint on this machine's own web server."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save({"model": {"a": torch.ones(2)}}, folder / "weights.pth")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    yield f"http://127.0.0.1:{httpd.server_port}/weights.pth", digest
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_with_its_checksum(server: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    url, digest = server
    with caplog.at_level(logging.WARNING, logger="xlearner_d2"):
        found = read_checkpoint(f"{url}#sha256={digest.upper()}")
    assert torch.equal(found["model"]["a"], torch.ones(2))
    assert not caplog.records


def test_without_one_it_is_told(server: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    url, digest = server
    with caplog.at_level(logging.WARNING, logger="xlearner_d2"):
        read_checkpoint(url)
    assert f"{url}#sha256={digest}" in caplog.text


def test_another_file_is_refused(server: tuple[str, str]) -> None:
    url, digest = server
    with pytest.raises(ConfigError, match=f"{'0' * 64} is expected, but .* has {digest}"):
        local_file(f"{url}#sha256={'0' * 64}")


def test_what_is_not_there(server: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.pth cannot be fetched"):
        local_file(server[0].replace("weights", "nothing"))


def test_a_plain_path_is_a_file() -> None:
    with pytest.raises(ConfigError, match=r"There is no checkpoint none\.pth"):
        local_file("none.pth")
