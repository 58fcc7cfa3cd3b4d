"""One program in several processes: the work inside is split, and every process goes on with the same numbers.

`torchrun` starts the processes. Each runs the whole program on the same data with the same seeds (SPMD), computes its
share of the rows, and the shares are put together: gradients and losses are added up, responses and values gathered.
A process by itself has all of every share, and every function here then does nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_TIMEOUT = timedelta(minutes=30)
_BUCKET_NUMBERS = 2**24
_T = TypeVar("_T")


class ProcessLost(RuntimeError):  # noqa: N818 - it is the other process that is at fault
    """Another process of the job has ended, or no longer answers."""


def local_rank() -> int:
    """Which of its machine's processes this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """Which of all processes this is."""
    return dist.get_rank() if _is_several() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_several() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Within it, the processes that `torchrun` started work together; a process by itself goes on by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    has_gpu = local_rank() < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_TIMEOUT)
    yield
    # Not after an error: the others may be waiting for this process, and its end is what tells them.
    dist.destroy_process_group()


def shares(costs: Sequence[float]) -> list[list[int]]:
    """Deals items out to the processes, from the dearest to the cheapest, there and back.

    Returns:
        Each process's items, in their order.
    """
    size = world_size()
    if size == 1:
        return [list(range(len(costs)))]
    dealt: list[list[int]] = [[] for _ in range(size)]
    for place, item in enumerate(sorted(range(len(costs)), key=lambda item: -costs[item])):
        turn, seat = divmod(place, size)
        dealt[seat if turn % 2 == 0 else size - 1 - seat].append(item)
    return [sorted(items) for items in dealt]


def share_of(costs: Sequence[float]) -> list[int]:
    """This process's items of those with the given costs."""
    return shares(costs)[rank()]


def part_of(indices: range) -> range:
    """This process's part of a range, without gaps."""
    size, place = world_size(), rank()
    return indices[len(indices) * place // size : len(indices) * (place + 1) // size]


def gathered(own: Mapping[int, _T]) -> dict[int, _T]:
    """What all processes have, by its index."""
    if not _is_several():
        return dict(own)
    everything: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(everything, dict(own))
    return {index: item for part in everything for index, item in part.items()}


def from_main(value: _T) -> _T:
    """The main process's value. None of the others is further on before the main process has come here."""
    if not _is_several():
        return value
    held = [value]
    with _collective():
        dist.broadcast_object_list(held, src=0)
    return held[0]


def on_main(work: Callable[[], _T]) -> _T:
    """Has the main process alone do something; all get what it returns, once it is done."""
    if not _is_several():
        return work()
    result: Any = work() if is_main() else None
    return from_main(result)


def wait_for_all() -> None:
    """Returns once every process has come here."""
    gathered({})


def sums(*numbers: float) -> list[float]:
    """Each number, added up over the processes."""
    if not _is_several():
        return list(numbers)
    return add_up(torch.tensor(numbers, dtype=torch.float64)).tolist()


def add_up(x: Tensor) -> Tensor:
    """Adds a tensor up over the processes, in place."""
    if _is_several():
        with _collective():
            dist.all_reduce(x)
    return x


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Adds the gradients up over the processes; a parameter has one where it has one in any of them."""
    if not _is_several():
        return
    # A sharded gradient has been added up when it was computed.
    for bucket in _buckets([p for p in parameters if not isinstance(p, DTensor)]):
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        has_gradient = torch.tensor([p.grad is not None for p in bucket], dtype=torch.float32, device=bucket[0].device)
        total = add_up(torch.cat([*flat, has_gradient]))
        *gradients, counts = total.split([*(p.numel() for p in bucket), len(bucket)])
        for parameter, gradient, count in zip(bucket, gradients, counts.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count else None


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in parts of a bounded size: one message each, and not a copy of all gradients at once."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _is_several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ProcessLost(
            "another process of this job has ended or does not answer; finished stages are kept, and --resume goes on "
            f"with them ({reason})"
        ) from error
