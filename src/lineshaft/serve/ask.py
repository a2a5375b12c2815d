"""The stage ANSWER: start the server on a checkpoint, ask it once over HTTP, stop it, keep the exchange.

The last stage of the shortest line, and the proof that what was trained can be served: the same process, port, protocol
and streaming that a user would meet.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
from pydantic import Field, PositiveFloat, PositiveInt

from lineshaft.base.config import Config
from lineshaft.base.errors import Capacity, EngineError, RequestError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import console
from lineshaft.engine.config import EngineConfig
from lineshaft.records.exchange import Exchange, Timing, write_exchanges
from lineshaft.serve.orders import Orders
from lineshaft.serve.server import ServeConfig

_POLL_S = 0.05
_STOP_SECONDS = 30.0
"""From SIGTERM to the end of a server that has nothing left to do, on a busy machine."""


class AnswerConfig(Config):
    """What to ask the served model."""

    prompt: Annotated[str, Field(min_length=1)]
    """Text that the model is to go on with."""
    max_tokens: PositiveInt = 64
    """Most tokens of the answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Makes an answer with a temperature repeatable."""
    engine: EngineConfig = EngineConfig()
    """How the engine runs."""
    ready_limit_seconds: PositiveFloat = 300.0
    """Give up when the server is not ready by then."""
    answer_limit_seconds: PositiveFloat = 300.0
    """Give up when the answer is not complete by then."""


@dataclass
class _Heard:
    """What came over the stream."""

    text: str = ""
    finish_reason: str = ""
    usage: dict[str, int] | None = None
    first_text: float | None = None
    """Time of the first text, on the monotonic clock."""


def _build(draft: Draft, config: AnswerConfig) -> None:
    checkpoint = draft.parents["checkpoint"]
    orders = Orders(folder=str(checkpoint.root), name=checkpoint.id, serve=ServeConfig(port=0), engine=config.engine)
    exchange, timing = asyncio.run(_exchange(orders, config))
    write_exchanges(draft, [(exchange, timing)])
    draft.facts |= exchange.model_dump(include={"finish_reason", "prompt_tokens", "completion_tokens"})
    draft.aside |= timing.model_dump()


ANSWER = Stage(
    name="answer",
    kind="traffic",
    version=1,
    config=AnswerConfig,
    build=_build,
    parents={"checkpoint": "checkpoint"},
    unkeyed=frozenset({"ready_limit_seconds", "answer_limit_seconds"}),
)


async def _exchange(orders: Orders, config: AnswerConfig) -> tuple[Exchange, Timing]:
    async with _server(orders, config.ready_limit_seconds) as (url, ready_seconds):
        sent = time.monotonic()
        try:
            async with asyncio.timeout(config.answer_limit_seconds):
                heard = await _ask(url, orders.name, config)
        except TimeoutError:
            raise EngineError(
                f"no whole answer within {config.answer_limit_seconds:g} s: lower max_tokens or raise answer_limit_seconds"
            ) from None
        ended = time.monotonic()
    if heard.usage is None:
        raise EngineError("the server ended its stream before the answer was complete")
    exchange = Exchange(
        model=orders.name,
        prompt=config.prompt,
        answer=heard.text,
        finish_reason=heard.finish_reason,
        prompt_tokens=heard.usage["prompt_tokens"],
        completion_tokens=heard.usage["completion_tokens"],
    )
    first = heard.first_text or ended
    return exchange, Timing(ready_seconds=ready_seconds, first_token_seconds=first - sent, seconds=ended - sent)


@asynccontextmanager
async def _server(orders: Orders, ready_limit: float) -> AsyncIterator[tuple[str, float]]:
    """A server process that is ready: its address, and the seconds that took. It has ended well when this is left."""
    began = time.monotonic()
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "lineshaft.serve", stdin=PIPE, stdout=PIPE)
    try:
        try:
            async with asyncio.timeout(ready_limit):
                url = f"http://{orders.serve.host}:{await _port(child, orders)}"
                await _until_ready(child, url)
        except TimeoutError:
            raise EngineError(f"the server was not ready within {ready_limit:g} s: raise ready_limit_seconds") from None
        yield url, time.monotonic() - began
        await _stop(child)
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()  # not `wait`: a pipe still open when the event loop ends can't be closed any more


async def _port(child: Process, orders: Orders) -> int:
    """Give the child its orders and learn where it listens. Its stdin stays open: the end of it ends the server."""
    assert child.stdin and child.stdout
    child.stdin.write(orders.model_dump_json().encode() + b"\n")
    line = await child.stdout.readline()
    if not line:
        raise await _ended_early(child)
    port: int = json.loads(line)["port"]
    return port


async def _until_ready(child: Process, url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while child.returncode is None:
            try:
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                if child.returncode is None:
                    await asyncio.wait([asyncio.ensure_future(child.wait())], timeout=_POLL_S)
                continue
            await asyncio.sleep(_POLL_S)
    raise await _ended_early(child)


async def _ended_early(child: Process) -> EngineError:
    return EngineError(f"the server ended with status {await child.wait()} before it was ready; its own message stands above")


async def _stop(child: Process) -> None:
    if child.returncode is None:
        child.send_signal(signal.SIGTERM)
    try:
        status = await asyncio.wait_for(child.wait(), _STOP_SECONDS)
    except TimeoutError:
        raise EngineError(f"the server did not stop within {_STOP_SECONDS:g} s of SIGTERM") from None
    if status != 0:
        raise EngineError(f"the server stopped with status {status} instead of 0; its own message stands above")


async def _ask(url: str, model: str, config: AnswerConfig) -> _Heard:
    """Stream one completion, showing its text as it comes."""
    body = config.model_dump(include={"prompt", "max_tokens", "temperature", "top_p", "seed"})
    body |= {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    heard = _Heard()
    limitless = aiohttp.ClientTimeout(total=None)  # the caller keeps the time
    async with aiohttp.ClientSession(timeout=limitless) as session, session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise _refusal(answer.status, (await answer.json())["error"])
        async for line in answer.content:
            event = line.removeprefix(b"data: ").strip()
            if event and event != b"[DONE]":
                _take(heard, json.loads(event))
    console.print()
    return heard


def _take(heard: _Heard, event: dict[str, Any]) -> None:
    if "error" in event:
        raise _refusal(500, event["error"])
    for choice in event["choices"]:
        if choice["text"] and heard.first_text is None:
            heard.first_text = time.monotonic()
        console.print(_harmless(choice["text"]), end="", markup=False, soft_wrap=True)
        heard.text += choice["text"]
        heard.finish_reason = choice["finish_reason"] or heard.finish_reason
    heard.usage = event.get("usage") or heard.usage


def _harmless(text: str) -> str:
    """For a terminal, which would obey escape sequences that a model happens to produce."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _refusal(status: int, error: dict[str, Any]) -> RequestError | Capacity | EngineError:
    if status == Capacity.status:
        return Capacity(error["message"])
    return RequestError(error["message"], error["param"]) if status < 500 else EngineError(error["message"])
