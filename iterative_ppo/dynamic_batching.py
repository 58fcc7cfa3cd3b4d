"""Dynamic batching: work that many callers hand in a little at a time, done in batches by a few threads.

While batches are computed the next one gathers. Nobody waits for a batch to fill: an idle thread takes what is there, and
batches grow with the load by themselves. The item that has waited longest goes first, and with it those that cost about the
same: what is computed together is padded to the longest.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

_WINDOW = 256
"""How many of the oldest items a batch is chosen from."""
_PADDED_PER_COST = 1.15


class QueueFullError(Exception):
    """The queue has no room for so many items: come back later."""


class BatchError(Exception):
    """The batch that an item was part of could not be computed; the message says why."""


class _Request(Generic[_Item, _Answer]):
    """Items handed in together, which may end up in several batches."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.items = items
        self.answers: list[_Answer | None] = [None] * len(items)
        self.num_open = len(items)
        self.is_begun = False
        self.future: Future[list[_Answer]] = Future()

    def begin(self) -> bool:
        """Whether somebody still waits for the answers; from the first time on they can no longer be cancelled."""
        if not self.is_begun:
            self.is_begun = True
            self.future.set_running_or_notify_cancel()
        return not self.future.done()

    def answer(self, place: int, answer: _Answer) -> None:
        self.answers[place] = answer
        self.num_open -= 1
        if self.num_open == 0 and not self.future.done():
            self.future.set_result(self.answers)  # type: ignore[arg-type]

    def fail(self, error: BatchError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[_Item, _Answer]):
    request: _Request[_Item, _Answer]
    place: int
    cost: int


class Batcher(Generic[_Item, _Answer]):
    """A bounded queue of items and the threads that work it off.

    Args:
        compute: gives the answers of a batch, in its order; called in every thread.
        cost: of an item.
        max_batch_cost: of a batch, each of its items counted as the costliest (a costlier item goes alone).
        max_queued_items: how many items may wait, those being computed not counted.
        num_threads: batches that may be computed at the same time.
        begin: called once in each thread before its first batch.
    """

    def __init__(
        self,
        compute: Callable[[list[_Item]], Sequence[_Answer]],
        *,
        cost: Callable[[_Item], int],
        max_batch_cost: int,
        max_queued_items: int,
        num_threads: int = 1,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._begin = begin
        self._compute = compute
        self._cost = cost
        self._max_batch_cost = max_batch_cost
        self.max_queued_items = max_queued_items
        self._queue: deque[_Waiting[_Item, _Answer]] = deque()
        self._changed = threading.Condition()
        self._is_open = True
        self._threads = [threading.Thread(target=self._work, name="batches", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def num_queued_items(self) -> int:
        return len(self._queue)

    def submit(self, items: Sequence[_Item]) -> "Future[list[_Answer]]":
        """Hands in items, at least one; their answers come in the same order, or a BatchError.

        Raises:
            QueueFullError: there is no room for all of them; none was taken.
        """
        assert items, "nothing to compute"
        with self._changed:
            assert self._is_open, "closed"
            if len(self._queue) + len(items) > self.max_queued_items:
                raise QueueFullError(f"{len(self._queue)} items wait, of at most {self.max_queued_items}")
            request: _Request[_Item, _Answer] = _Request(items)
            self._queue.extend(_Waiting(request, place, self._cost(item)) for place, item in enumerate(items))
            self._changed.notify_all()
        return request.future

    def close(self) -> None:
        """Takes nothing more, and returns when all that was taken is answered."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        self._begin()
        while batch := self._next_batch():
            try:
                answers = self._compute([waiting.request.items[waiting.place] for waiting in batch])
                assert len(answers) == len(batch)
            except Exception as error:  # whatever it is, it must reach those who wait, and the thread must live on
                with self._changed:
                    for waiting in batch:
                        waiting.request.fail(BatchError(f"{type(error).__name__}: {error}"))
                continue
            with self._changed:  # another thread may hold other items of the same request
                for waiting, answer in zip(batch, answers, strict=True):
                    waiting.request.answer(waiting.place, answer)

    def _next_batch(self) -> list[_Waiting[_Item, _Answer]]:
        """Waits for work; nothing where the batcher was closed and all is done."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or not self._is_open)
                if not self._queue:
                    return []
                oldest = [self._queue.popleft() for _ in range(min(_WINDOW, len(self._queue)))]
                oldest = [waiting for waiting in oldest if waiting.request.begin()]
                batch = self._fitting(oldest)
                taken = set(map(id, batch))
                self._queue.extendleft(waiting for waiting in reversed(oldest) if id(waiting) not in taken)
                if batch:
                    return batch

    def _fitting(self, oldest: list[_Waiting[_Item, _Answer]]) -> list[_Waiting[_Item, _Answer]]:
        """The first item, and of those that are nearest to it in cost as many as fit."""
        batch: list[_Waiting[_Item, _Answer]] = []
        total = largest = 0
        for waiting in sorted(oldest, key=lambda waiting: abs(waiting.cost - oldest[0].cost)):
            total, largest = total + waiting.cost, max(largest, waiting.cost)
            padded = largest * (len(batch) + 1)
            if batch and (padded > self._max_batch_cost or padded > _PADDED_PER_COST * total):
                break
            batch.append(waiting)
        return batch
