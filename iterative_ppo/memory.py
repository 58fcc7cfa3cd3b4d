"""How the process treats memory that it has freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Keeps what the process frees for its next use, up to 1 GiB; does nothing where the C library is not glibc.

    A training step or a batch frees its tensors and the next one asks for as much. glibc gives large blocks back to the
    system and takes them anew, page by page: 4 % of an update's time (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, num_bytes in ((_M_TRIM_THRESHOLD, 1 << 30), (_M_MMAP_THRESHOLD, 32 << 20)):
            libc.mallopt(option, num_bytes)
