"""The queue behind the Q service: every answer to the one who asked, whatever it was batched with, and a bound."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest

from iterative_ppo.dynamic_batching import Batcher, BatchError, QueueFullError


class Gate:
    """A computation (the square) that waits until it is let through, and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.began = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.began.release()
        assert self.opened.acquire(timeout=10)
        return [item * item for item in items]


def squares(items: list[int]) -> list[int]:
    return [item * item for item in items]


Make = Callable[..., Batcher[int, int]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes batchers and closes them; an item costs 1."""
    made = []

    def new(
        compute: Callable[[list[int]], Sequence[int]], *, most: int = 4, room: int = 100, threads: int = 1
    ) -> Batcher[int, int]:
        made.append(Batcher(compute, cost=lambda _: 1, max_batch_cost=most, max_queued_items=room, num_threads=threads))
        return made[-1]

    yield new
    for batcher in made:
        batcher.close()


def test_answers_come_back_in_the_order_of_the_items(make: Make) -> None:
    assert make(squares).submit([3, 1, 2]).result(timeout=10) == [9, 1, 4]


def test_an_idle_batcher_takes_an_item_at_once_and_a_busy_one_gathers(make: Make) -> None:
    """One item is computed alone; what comes meanwhile is computed together, at most four, first come first served."""
    gate = Gate()
    batcher = make(gate)
    futures = [batcher.submit([0])]
    assert gate.began.acquire(timeout=10)
    futures += [batcher.submit([i]) for i in range(1, 7)]
    assert batcher.num_queued_items == 6
    for _ in range(3):
        gate.opened.release()
    assert [future.result(timeout=10) for future in futures] == [[i * i] for i in range(7)]
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_request_may_span_batches_and_a_batch_requests(make: Make) -> None:
    gate = Gate()
    batcher = make(gate, most=3)
    first = batcher.submit([0])
    assert gate.began.acquire(timeout=10)
    long, short = batcher.submit([1, 2, 3, 4]), batcher.submit([5])
    for _ in range(3):
        gate.opened.release()
    assert (first.result(10), long.result(10), short.result(10)) == ([0], [1, 4, 9, 16], [25])
    assert gate.batches == [[0], [1, 2, 3], [4, 5]]


def test_a_batch_is_bounded_by_cost_and_a_costlier_item_goes_alone() -> None:
    """The oldest first, with those of about its cost: 4 and 5 are twice 5, of 10 at most; 6 and 2 would be twice 6."""
    gate = Gate()
    batcher = Batcher(gate, cost=lambda item: item, max_batch_cost=10, max_queued_items=100)
    batcher.submit([1])
    assert gate.began.acquire(timeout=10)
    future = batcher.submit([4, 6, 5, 99, 2])
    for _ in range(6):
        gate.opened.release()
    assert future.result(timeout=10) == [16, 36, 25, 99 * 99, 4]
    assert gate.batches == [[1], [4, 5], [6], [99], [2]]
    batcher.close()


def test_two_threads_compute_two_batches_of_one_request_at_the_same_time(make: Make) -> None:
    gate = Gate()
    future = make(gate, most=2, threads=2).submit([1, 2, 3])
    for _ in range(2):
        assert gate.began.acquire(timeout=10), "the second batch waits for the first"
    assert sorted(gate.batches) == [[1, 2], [3]]
    assert not future.done()
    for _ in range(2):
        gate.opened.release()
    assert future.result(timeout=10) == [1, 4, 9]


def test_each_thread_begins_once_before_its_first_batch() -> None:
    begun: list[str] = []
    batcher = Batcher(
        squares,
        cost=lambda _: 1,
        max_batch_cost=1,
        max_queued_items=9,
        num_threads=3,
        begin=lambda: begun.append(threading.current_thread().name),
    )
    assert batcher.submit(list(range(9))).result(timeout=10) == squares(list(range(9)))
    batcher.close()
    assert begun == ["batches"] * 3


def test_a_full_queue_takes_all_of_a_request_or_nothing(make: Make) -> None:
    gate = Gate()
    batcher = make(gate, room=3)
    batcher.submit([0])
    assert gate.began.acquire(timeout=10)
    batcher.submit([1, 2])
    with pytest.raises(QueueFullError, match="2 items wait, of at most 3"):
        batcher.submit([3, 4])
    assert batcher.num_queued_items == 2
    last = batcher.submit([5])
    for _ in range(2):
        gate.opened.release()
    assert last.result(timeout=10) == [25]
    assert gate.batches == [[0], [1, 2, 5]]


def test_who_goes_away_while_waiting_is_not_computed_and_who_goes_later_harms_nobody(make: Make) -> None:
    gate = Gate()
    batcher = make(gate)
    computing = batcher.submit([0])
    assert gate.began.acquire(timeout=10)
    gone, stays = batcher.submit([1, 2]), batcher.submit([3])
    assert gone.cancel()
    assert not computing.cancel(), "its batch is under way"
    for _ in range(2):
        gate.opened.release()
    assert computing.result(timeout=10) == [0]
    assert stays.result(timeout=10) == [9]
    assert gate.batches == [[0], [3]]


def test_a_batch_that_fails_fails_its_own_requests_alone(make: Make) -> None:
    def compute(items: list[int]) -> list[int]:
        if 13 in items:
            raise RuntimeError("no thirteen")
        return squares(items)

    batcher = make(compute, most=2)
    bad = batcher.submit([1, 13, 2, 13, 3])
    with pytest.raises(BatchError, match="RuntimeError: no thirteen"):
        bad.result(timeout=10)
    assert batcher.submit([4]).result(timeout=10) == [16]


def test_too_few_answers_are_an_error_and_not_somebody_elses(make: Make) -> None:
    batcher = make(lambda items: items[1:])
    with pytest.raises(BatchError, match="AssertionError"):
        batcher.submit([1, 2]).result(timeout=10)


def test_closing_answers_everything_that_was_taken() -> None:
    gate = Gate()
    batcher = Batcher(gate, cost=lambda _: 1, max_batch_cost=2, max_queued_items=100)
    futures = [batcher.submit([i]) for i in range(7)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    for _ in range(7):
        gate.opened.release()
    closing.join(timeout=10)
    assert not closing.is_alive()
    assert [future.result(timeout=0) for future in futures] == [[i * i] for i in range(7)]
    with pytest.raises(AssertionError):
        batcher.submit([1])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_callers_lose_nothing_and_mix_nothing_up(make: Make, threads: int) -> None:
    """64 callers with requests of 1 to 9 items; each gets the squares of its own numbers."""
    sizes: list[int] = []

    def compute(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return squares(items)

    batcher = make(compute, most=16, room=10_000, threads=threads)

    def ask(seed: int) -> int:
        generator = np.random.default_rng(seed)
        num_items = 0
        for _ in range(20):
            items = generator.integers(0, 10**6, int(generator.integers(1, 10))).tolist()
            assert batcher.submit(items).result(timeout=30) == squares(items)
            num_items += len(items)
        return num_items

    with ThreadPoolExecutor(64) as pool:
        asked: list[Future[int]] = [pool.submit(ask, seed) for seed in range(64)]
        wait(asked)
    assert sum(future.result() for future in asked) == sum(sizes)
    assert max(sizes) <= 16
