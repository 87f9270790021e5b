"""A process on a CPU keeps what it frees."""

import os
import platform
import subprocess
import sys

import pytest

_PAGES = """
import resource
import torch
from xlearner_d2.engine.memory import keep_freed_memory

if {keep}:
    keep_freed_memory()

def step():
    held = [torch.ones(20, 1024, 1024, dtype=torch.uint8) for _ in range(8)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _new_pages(keep: bool) -> int:
    command = [sys.executable, "-c", _PAGES.format(keep=keep)]
    # As at the start of a process: glibc raises the threshold by itself, and whether large blocks are then handed back
    # depends on what happens to lie above them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    return int(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_what_is_freed_is_not_asked_for_again():
    # Ten times 160 MiB, which are 409,600 pages of 4 KiB, or fewer where the system has larger ones.
    assert _new_pages(keep=True) < min(100, _new_pages(keep=False) / 10)


def test_without_glibc_nothing_is_done(monkeypatch):
    from xlearner_d2.engine import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("called"))
    memory.keep_freed_memory()
