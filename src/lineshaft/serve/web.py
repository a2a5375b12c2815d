"""What HTTP asks for around a request: reading a body within limits, streams that let go, clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lineshaft.serve.limits import Limits
from lineshaft.serve.refusals import body_too_large, body_too_slow, wrong_content

T = TypeVar("T")


async def body_of(request: Request, limits: Limits) -> bytes:
    """The request's body. Raises RequestError when it is not JSON by name or too large, Capacity (408) when it comes too slowly."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise wrong_content(kind)
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:19]) > limits.max_body_bytes:
        raise body_too_large(limits.max_body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise body_too_large(limits.max_body_bytes)
    except TimeoutError:
        raise body_too_slow(limits.body_seconds) from None
    return bytes(body)


class EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however they end, also before their first chunk."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], let_go: Callable[[], None], seconds: float) -> None:
        """After so many seconds a client that does not read what it asked for is let go."""
        super().__init__(chunks, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._let_go, self._seconds = let_go, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # the server closes a connection whose answer was left incomplete
        finally:
            self._let_go()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def as_json(answer: Any) -> Response:
    """An answer as JSON."""
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
