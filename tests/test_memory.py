"""Freed memory is kept."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from iterative_ppo.memory import keep_freed_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident_mib()
blocks = [np.ones(2**20) for _ in range(20)]  # 8 MiB each
held = resident_mib()
del blocks
print(held - before, resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_freed_is_kept_for_its_next_use(keep: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, "keep" if keep else "leave"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    held, left = map(float, output.split())
    assert held > 150
    assert (left > 150) == keep
    assert (left < 50) != keep
