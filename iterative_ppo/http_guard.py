"""What stands before an HTTP service's routes: its key, the bound on a body, and the count of requests."""

import asyncio
import hmac
import time
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 * 1024 * 1024
_BODY_SECONDS = 60.0


class RefusalError(Exception):
    """A request that gets a status and one line instead of an answer."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.response = JSONResponse({"detail": " ".join(line.split())}, status, headers)


async def read_body(request: Request) -> bytes:
    """A request's body; RefusalError where it is larger than the bound, whatever its headers say, or does not come."""
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                chunks.append(chunk)
                num_bytes += len(chunk)
                if num_bytes > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise RefusalError(408, f"body: did not come within {_BODY_SECONDS:g} seconds") from None
    return b"".join(chunks)


def _too_large() -> RefusalError:
    return RefusalError(413, f"body: larger than {MAX_BODY_BYTES} bytes")


class Guard:
    """ASGI middleware: key and declared size are checked before a body is read, and every request is counted.

    Args:
        app: what is guarded.
        api_key: `Authorization: Bearer` must hold it; None lets everybody in.
        open_paths: that need no key.
        known_paths: that are counted by name, all others together.
        count: told of every request its path, its status and its seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        open_paths: Collection[str],
        known_paths: Collection[str],
        count: Callable[[str, int, float], None],
    ) -> None:
        self.app = app
        self.api_key = None if api_key is None else api_key.strip().encode(errors="surrogateescape")
        self.open_paths = open_paths
        self.known_paths = known_paths
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            await (self.app if refusal is None else refusal.response)(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self.known_paths else "other"
            self.count(path, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = Headers(scope=scope)
        if scope["path"] not in self.open_paths and not self._is_authorized(headers.get("authorization", "")):
            line = "this service needs its key: Authorization: Bearer ..."
            return RefusalError(401, line, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        return _too_large() if length.isdigit() and int(length) > MAX_BODY_BYTES else None

    def _is_authorized(self, authorization: str) -> bool:
        if self.api_key is None:
            return True
        scheme, _, key = authorization.partition(" ")
        is_same = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key)
        return is_same and scheme.lower() == "bearer"
