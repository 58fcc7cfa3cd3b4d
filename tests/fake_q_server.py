"""A Q server for the tests: the protocol of `ippo serve-q` on a free port, and what can go wrong with it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Score = Callable[[Mapping[str, Any]], float]


@dataclass
class QServer:
    """A running server.

    Example:
        QServer(url="http://127.0.0.1:41233", questions=[("/v1/q", {"items": [...]}, {"Authorization": "Bearer x"})])
    """

    url: str
    questions: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path, body and headers of each."""


@contextmanager
def q_server(
    score: Score, *, mishaps: list[Callable[[BaseHTTPRequestHandler], None]] | None = None
) -> Iterator[QServer]:
    """Answers `/v1/q` and `/get_reward` by a function of an item; each mishap answers one question in its place."""
    left = list(mishaps or [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.questions.append((self.path, body, dict(self.headers)))
            if left:
                left.pop(0)(self)
                return
            items = body["items"] if self.path == "/v1/q" else [{"query": query} for query in body["query"]]
            rewards = [score(item) for item in items]
            name = "q_values" if self.path == "/v1/q" else "scores"
            answer(self, {"rewards": rewards, name: rewards})

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        server = QServer(url=url)
        yield server


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port, in a thread; its URL."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def answer(handler: BaseHTTPRequestHandler, body: object, *, status: int = 200, **headers: str) -> None:
    """Writes a response; a body that is no text is sent as JSON, NaN included."""
    text = body if isinstance(body, str) else json.dumps(body)
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def answers(body: object, *, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """A mishap: this answer in place of the right one."""
    return lambda handler: answer(handler, body, status=status, **headers)


def sleeps(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """A mishap: no answer for a while, and then none."""
    return lambda _: time.sleep(seconds)
