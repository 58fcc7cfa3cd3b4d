"""What `torchrun` tells a process in its environment, read without `distributed`, which loads torch."""

import os


def num_processes() -> int:
    """How many processes `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> str:
    """Which of its machine's processes this is."""
    return os.environ.get("LOCAL_RANK", "0")


def is_main() -> bool:
    """Whether this process is the only one or the first."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"
