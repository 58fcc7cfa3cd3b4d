"""Q as a service over HTTP: our own JSON, OpenRLHF's remote reward and vLLM's classification, one queue behind them."""

import asyncio
import gc
import ipaddress
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from iterative_ppo.conversation_checks import FieldError
from iterative_ppo.dynamic_batching import Batcher, BatchError, QueueFullError
from iterative_ppo.http_guard import Guard, RefusalError, read_body
from iterative_ppo.q_metrics import Metrics
from iterative_ppo.q_requests import ItemsRequest, parse_classify, parse_q, parse_reward
from iterative_ppo.q_scoring import Item, QScorer, Reading

MAX_QUEUED_ITEMS = 8192
_KEEP_ALIVE_SECONDS = 75
_SMALL_BODY_BYTES = 64 * 1024
_Parse = Callable[[bytes, QScorer], ItemsRequest]


class Service:
    """The routes, over one queue and the threads that run the model.

    Args:
        scorer: Q.
        name: what the answers call the Q-function.
        max_queued_items: how many items may wait.
        num_workers: batches that are computed at the same time, each with its share of torch's threads.
    """

    def __init__(
        self, scorer: QScorer, *, name: str, max_queued_items: int = MAX_QUEUED_ITEMS, num_workers: int = 1
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.batcher: Batcher[Item, Reading] = Batcher(
            self._compute,
            cost=lambda item: item.num_tokens,
            max_batch_cost=scorer.tokens_per_batch,
            max_queued_items=max_queued_items,
            num_threads=num_workers,
            begin=partial(torch.set_num_threads, torch.get_num_threads() // num_workers),
        )
        self.metrics = Metrics(lambda: self.batcher.num_queued_items)
        self.num_answered = 0
        self._large_bodies = ThreadPoolExecutor(max_workers=1)

    async def q(self, request: Request) -> Response:
        """`POST /v1/q`."""
        _, readings = await self._readings(request, parse_q)
        return JSONResponse({"rewards": [r.reward for r in readings], "q_values": [r.q_value for r in readings]})

    async def get_reward(self, request: Request) -> Response:
        """`POST /get_reward`, OpenRLHF's remote reward."""
        _, readings = await self._readings(request, parse_reward)
        rewards = [r.reward for r in readings]
        extra_logs = {"q_value": [r.q_value for r in readings]}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": extra_logs})

    async def classify(self, request: Request) -> Response:
        """`POST /classify`, vLLM's classification with one class, whose "probability" is Q."""
        asked, readings = await self._readings(request, parse_classify)
        data = [
            {"index": i, "label": "Q", "probs": [reading.q_value], "num_classes": 1}
            for i, reading in enumerate(readings)
        ]
        num_tokens = sum(item.num_tokens for item in asked.items)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
        return JSONResponse({"object": "list", "model": asked.model or self.name, "data": data, "usage": usage})

    async def health(self, _: Request) -> Response:
        """`GET /health`: 200 where there is room in the queue, else 503."""
        card, num_queued = self.scorer.card, self.batcher.num_queued_items
        is_ready = num_queued < self.batcher.max_queued_items
        about = {
            "ready": is_ready,
            "q_function": self.name,
            "link": card.link,
            "gamma": card.gamma,
            "policy": card.policy,
            "pessimism": self.scorer.pessimism,
            "context_tokens": self.scorer.renderer.context_tokens,
            "queued_items": num_queued,
        }
        return JSONResponse(about, 200 if is_ready else 503)

    async def show_metrics(self, _: Request) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def close(self) -> None:
        """Answers what was taken."""
        await asyncio.to_thread(self.batcher.close)
        self._large_bodies.shutdown()

    def _compute(self, items: list[Item]) -> list[Reading]:
        self.metrics.count_batch(items)
        return self.scorer.read(items)

    async def _readings(self, request: Request, parse: _Parse) -> tuple[ItemsRequest, list[Reading]]:
        body = await read_body(request)
        try:
            if len(body) <= _SMALL_BODY_BYTES:
                asked = parse(body, self.scorer)
            else:  # would hold up everybody else's
                loop = asyncio.get_running_loop()
                asked = await loop.run_in_executor(self._large_bodies, parse, body, self.scorer)
        except FieldError as error:
            raise RefusalError(422, f"{error.field or 'body'}: {error.reason}") from None
        if len(asked.items) > self.batcher.max_queued_items:
            raise RefusalError(
                413, f"body: {len(asked.items)} items are more than the queue holds, {self.batcher.max_queued_items}"
            )
        try:
            readings = await asyncio.wrap_future(self.batcher.submit(asked.items))
        except QueueFullError as error:
            raise RefusalError(429, f"the queue is full: {error}; try again", {"Retry-After": "1"}) from None
        except BatchError as error:
            raise RefusalError(500, f"the batch could not be computed: {error}") from None
        for place, reading in enumerate(readings):
            if not (math.isfinite(reading.reward) and math.isfinite(reading.q_value)):
                raise RefusalError(500, f"Q of item {place} is not a finite number ({reading.q_value})")
        self.num_answered += len(readings)
        return asked, readings


def make_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """The service as an ASGI application; with a key, all routes but /health ask for it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusalError)
        return error.response

    async def nobody_there(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        exception_handlers={RefusalError: refuse, ClientDisconnect: nobody_there},
    )
    posted = {"/v1/q": service.q, "/get_reward": service.get_reward, "/classify": service.classify}
    got = {"/health": service.health, "/metrics": service.show_metrics}
    app.add_middleware(
        Guard,
        api_key=api_key,
        open_paths=("/health",),
        known_paths=(*posted, *got),
        count=service.metrics.count_request,
    )
    for path, endpoint in posted.items():
        app.add_route(path, endpoint, methods=["POST"])
    for path, show in got.items():
        app.add_route(path, show, methods=["GET"])
    return app


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.when_ready()


def serve(folder: Path, load: Callable[[], QScorer], *, host: str, port: int, say: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT, and then answers what it has taken.

    Args:
        folder: of the Q-function.
        load: loads it, once the address is known to be free.
        port: 0 takes one that is free.
        say: prints a line.

    Returns:
        The number of items answered.

    Raises:
        ValueError: the address cannot be had, or the key is empty.
    """
    api_key = os.environ.get("IPPO_API_KEY")
    if api_key is not None and not api_key.strip():
        raise ValueError("IPPO_API_KEY: is set but empty; give the key, or unset it to serve without one")
    with _bound(host, port) as bound:
        address, port = bound.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(address).is_loopback:
            say(f"warning: {address} can be reached from other machines, and without IPPO_API_KEY anybody may ask")
        scorer = load()
        service = Service(scorer, name=str(folder), num_workers=_num_workers(scorer.q_function.device))
        shown_host = f"[{address}]" if ":" in address else address
        server = _Server(
            uvicorn.Config(
                make_app(service, api_key=api_key),
                log_level="warning",
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                ws="none",
            ),
            lambda: say(
                f"serving {folder} (Q of {scorer.card.policy}, pessimism {scorer.pessimism:g}) on http://{shown_host}:{port}"
            ),
        )
        # uvicorn hands a signal on when it has shut down; by itself that would end the process with the signal's code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        gc.collect()
        gc.freeze()  # what is loaded stays, and need not be looked through for garbage
        server.run(sockets=[bound])
    return service.num_answered


def _num_workers(device: torch.device) -> int:
    """Two on a CPU with more than one thread: while one is in Python, or waits for its last core, the other computes."""
    return 2 if device.type == "cpu" and torch.get_num_threads() > 1 else 1


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(f"{host}:{port}: cannot be bound (--host, --port): {error.strerror}") from None
    return bound
