"""What a process does with the memory of a CPU that it has freed."""

import ctypes
import platform

# Of <malloc.h>. glibc takes no larger threshold than half a heap, 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 * 1024**2
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on, keep what is freed for the next step, which wants as much, and hand it back at the end.

    By default glibc returns large blocks to the system at once, so that every step of a training on a CPU gets its
    activations anew, page by page, each of which the kernel clears: a tenth of the time and more (docs/SPEED.md). The
    peak is hardly higher, as it recurs at each step. Blocks of more than 32 MiB stay as they were. Without glibc this
    does nothing. The setting holds for processes that are forked from this one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
