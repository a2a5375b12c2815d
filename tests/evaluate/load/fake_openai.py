"""A server that speaks OpenAI's language and answers after delays that the test chose."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

Delay = Callable[[int], float]


class FakeOpenAI:
    """`first(n)` seconds to the first token of the n-th request, `gap` between tokens; `workers` at once, None for all.

    From `stall_at` on (seconds of the loop's clock since the first request) nothing is answered for `stall` seconds.
    """

    def __init__(self, first: Delay = lambda _: 0.1, gap: float = 0.0, *, workers: int | None = None, models=("fake",), **faults):
        self.first, self.gap, self.models, self.faults = first, gap, models, faults
        self.gate = asyncio.Semaphore(workers) if workers else None
        self.began: float | None = None
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.took: list[float] = []
        self.answered = threading.Semaphore(0)

    def app(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.listed)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app

    async def listed(self, request):
        if status := self.faults.get("models_status"):
            return web.json_response({"error": {"message": f"key {request.headers.get('authorization')} is bad"}}, status=status)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def answer(self, request):
        clock = asyncio.get_running_loop().time
        body = await request.json()
        number = len(self.bodies) - 1  # the first look is -1
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        arrived = clock()
        if number == 0:
            self.began = arrived
        if number >= self.faults.get("errors_from", 1 << 60) or (number < 0 and "look_status" in self.faults):
            status = self.faults.get("status" if number >= 0 else "look_status", 500)
            return web.json_response({"error": {"message": "cannot"}}, status=status)
        if self.gate:
            async with self.gate:
                await self.work(number)
        else:
            await self.work(number)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await self.stream(request, response, body, number)
        self.took.append(clock() - arrived)
        self.answered.release()
        return response

    async def work(self, number):
        await asyncio.sleep(0 if number < 0 else self.first(number))
        if self.began is not None and "stall" in self.faults:
            since = asyncio.get_running_loop().time() - self.began
            begin = self.faults["stall_at"]
            if begin <= since < begin + self.faults["stall"]:
                await asyncio.sleep(begin + self.faults["stall"] - since)

    async def stream(self, request, response, body, number):
        chat = "messages" in body
        if chat:
            await self.event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        if number >= self.faults.get("breaks_from", 1 << 60):
            await self.event(response, {"error": {"message": "engine died", "code": "engine_error"}})
            return
        if number >= self.faults.get("hangs_up_from", 1 << 60):
            request.transport.close()
            return
        for token in range(body["max_tokens"]):
            if token and self.gap:
                await asyncio.sleep(self.gap)
            last = token == body["max_tokens"] - 1 and number < self.faults.get("cut_from", 1 << 60)
            piece = {"delta": {"content": "x"}} if chat else {"text": "x"}
            await self.event(response, {"choices": [piece | {"finish_reason": "length" if last else None}]})
        if self.faults.get("usage", True):
            counts = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": body["max_tokens"]}
            await self.event(response, {"choices": [], "usage": counts})
        if number < self.faults.get("cut_from", 1 << 60):
            await response.write(b"data: [DONE]\n\n")

    async def event(self, response, table):
        await response.write(b": note\n\ndata: " + json.dumps(table).encode() + b"\r\n\r\n")


@asynccontextmanager
async def listening(fake):
    runner = web.AppRunner(fake.app(), access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def served(fake):
    """The server in a thread, by real time."""
    loop, up, down = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found = []

    async def main():
        async with listening(fake) as url:
            found.append(url)
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert up.wait(30)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join()
        loop.close()
