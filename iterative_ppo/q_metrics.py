"""What the Q service tells Prometheus about itself."""

from collections.abc import Callable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from iterative_ppo.q_scoring import Item

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one service, in a registry of their own.

    Args:
        queue_length: items that wait, asked for at each scrape.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("ippo_q_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "ippo_q_request_seconds",
            "From a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_items = Histogram(
            "ippo_q_batch_items", "Items computed together.", buckets=_ITEMS, registry=self._registry
        )
        self._tokens = Counter("ippo_q_tokens", "Tokens of all items computed.", registry=self._registry)
        queue = Gauge("ippo_q_queue_items", "Items that wait.", registry=self._registry)
        queue.set_function(queue_length)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def count_batch(self, items: Sequence[Item]) -> None:
        self._batch_items.observe(len(items))
        self._tokens.inc(sum(item.num_tokens for item in items))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
