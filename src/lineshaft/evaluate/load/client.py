"""The HTTP side: one request sent and its stream timed, and the first look at a server. Called by `bench`.

Sends to the address that was named and nowhere else: no redirects, no proxies from the environment, no cookies. The key
comes from the environment, goes into one header, and is taken out of every text that a server sends back.
"""

from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from lineshaft.base.errors import Capacity, ConfigError, EngineError, LineshaftError, RequestError, UnknownModel
from lineshaft.evaluate.load.record import Record
from lineshaft.evaluate.load.wire import DONE, PATHS, Api, Event, Lines, event

LOOK_SECONDS = 60.0
"""How long a server may take to list its models, and at least to answer the first request."""
_KEEP_SECONDS = 2.0
"""An idle connection is closed after this: before the server does it, which would look like a failure (uvicorn: after 5 s)."""
_DETAIL = 300
"""Characters of a server's complaint that are kept."""
_MOST_NAMES = 10
"""Models that an error lists; some services have hundreds."""
_OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
"""Errors of a connection that say that this machine has run out of something."""


@dataclass(frozen=True)
class Target:
    """Who is asked, and in which of OpenAI's two ways."""

    url: str
    """Scheme, host and port, without a path."""
    model: str
    api: Api
    key: str | None = field(default=None, repr=False)

    def clean(self, text: str) -> str:
        """`text` on one line, short, without the key, and without what moves a terminal's cursor."""
        line = " ".join((text.replace(self.key, "(key)") if self.key else text).split())
        return "".join(sign for sign in line if sign.isprintable())[:_DETAIL]


def address(url: str) -> str:
    """A server's URL without `/v1` and slashes at its end. Raises ConfigError for what can't be one."""
    told = f'"{url}": write a server as http://host:port'
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or half an IPv6 address
        raise ConfigError(told) from None
    if not good or parts.query or parts.fragment:
        raise ConfigError(told)
    if "@" in parts.netloc:
        raise ConfigError("a server's URL is shown and stored: no name or password in it; put a key into OPENAI_API_KEY")
    return url.rstrip("/").removesuffix("/v1")


def usable_key(text: str | None) -> str | None:
    """A key as it can stand in a header; None for none. Raises ConfigError, which doesn't show it, for one that can't."""
    key = (text or "").strip()  # `$(cat file)` and .env files leave white space
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("OPENAI_API_KEY holds characters that no key has: set it to the key alone")
    return key or None


@asynccontextmanager
async def connected(key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose pool has no limit: a request never waits for another's connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each request under way is an open file
    headers = {"authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS)
    try:
        async with aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `generate` has its own, from the schedule
        ) as session:
            yield session
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def send(session: aiohttp.ClientSession, target: Target, body: bytes, record: Record, start: float) -> None:
    """Send one request and write down when what came. Failures are written down, too, and not raised.

    `start` is when the run began, by the clock of the event loop.
    """
    try:
        await _converse(session, target, body, record, start)
    except aiohttp.ClientConnectorError as error:
        number = error.os_error.errno if error.os_error else None
        _failed(record, "client" if number in _OURS else "connection", target.clean(str(error)))
    except (aiohttp.ClientError, OSError) as error:
        if record.ended is None:  # else the answer was whole, and only the connection broke behind it
            _failed(record, "cut off" if record.tokens_at else "connection", target.clean(str(error) or type(error).__name__))
    except ValueError as error:
        _failed(record, "bad answer", target.clean(str(error)))


async def _converse(session: aiohttp.ClientSession, target: Target, body: bytes, record: Record, start: float) -> None:
    clock = asyncio.get_running_loop().time
    record.sent = clock() - start
    headers = {"content-type": "application/json"}
    async with session.post(target.url + PATHS[target.api], data=body, headers=headers, allow_redirects=False) as answer:
        if answer.status != 200:
            _failed(record, f"http {answer.status}", target.clean(_message(await _head(answer, 4096))))
            return
        if answer.content_type != "text/event-stream":
            _failed(record, "bad answer", f"{answer.content_type} instead of a stream of events")
            return
        lines, last = Lines(), None
        async for data in answer.content.iter_any():
            now = clock() - start
            for payload in lines.push(data):
                if payload == DONE:
                    record.ended = last
                elif payload:
                    last = _taken(event(payload), record, now, last, target)
                    if record.error:
                        return
        _finish(record, last)


def _taken(seen: Event, record: Record, now: float, last: float | None, target: Target) -> float | None:
    """Write an event down; returns when the answer's last piece came, None while it has none."""
    if seen.error is not None:
        _failed(record, "in the stream", target.clean(_message(msgspec.json.encode({"error": seen.error}))))
    if seen.usage:
        record.prompt_tokens, record.counted_tokens = seen.usage.prompt_tokens, seen.usage.completion_tokens
    if seen.has_text:
        record.tokens_at.append(now)
        last = now
    if seen.finishes:
        record.ended = last = now
    return last


def _finish(record: Record, last: float | None) -> None:
    """The stream is at its end: was the answer?"""
    if record.ended is None:
        _failed(record, "cut off", "the stream ended without a finish reason or [DONE]" if last else "the stream held no answer")
    elif not record.tokens_at:
        record.tokens_at.append(record.ended)  # tokens that show nothing, such as half a character: the end is all that can be timed


def _failed(record: Record, kind: str, detail: str) -> None:
    record.error, record.detail = kind, detail


async def _head(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The first `most` bytes of a body; one read gives only what has come by then."""
    body = b""
    while len(body) < most and (data := await answer.content.read(most - len(body))):
        body += data
    return body


def _message(body: bytes) -> str:
    """What an error's body says: OpenAI's shape if it is that, else its text."""
    try:
        table: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return body.decode("utf-8", "replace")
    inner = table.get("error", table) if isinstance(table, dict) else table
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


# -- the first look ---------------------------------------------------------------------------------------------


async def find_model(session: aiohttp.ClientSession, url: str, wanted: str | None, key: str | None) -> str:
    """The model to ask for: the one named, else the only one served.

    Raises ConfigError when no server answers, it refuses the key, or it serves several; UnknownModel when it has not the one wanted.
    """
    blank = Target(url, "", "completions", key)
    try:
        async with asyncio.timeout(LOOK_SECONDS), session.get(url + "/v1/models", allow_redirects=False) as answer:
            status, body = answer.status, await _head(answer, 4 << 20)
    except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError, too
        raise ConfigError(f"{url}: no server answers there: {blank.clean(str(error) or type(error).__name__)}") from None
    if status != 200 and wanted and status not in (401, 403):
        return wanted  # some servers keep no list
    if status != 200:
        raise _refusal(blank, Record(0, 0.0, error=f"http {status}", detail=blank.clean(_message(body))))
    names = _names(body)
    if wanted and names and wanted not in names:
        raise UnknownModel(f'{url} does not serve "{wanted}"; it has {_listed(names, blank)}', "model")
    if not wanted and len(names) != 1:
        raise ConfigError(f"{url} serves {_listed(names, blank) or 'no model that it names'}: choose one with --model")
    return wanted or names[0]


def _names(body: bytes) -> list[str]:
    try:
        return [str(card["id"]) for card in msgspec.json.decode(body)["data"]]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return []


def _listed(names: list[str], target: Target) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(target.clean(name) for name in names[:_MOST_NAMES]) + more


async def look(session: aiohttp.ClientSession, target: Target, body: bytes, seconds: float) -> None:
    """Ask once, uncounted, so that what every request would be refused for is told at once and in words.

    Waits `seconds` at most. Raises ConfigError, RequestError, UnknownModel, Capacity or EngineError.
    """
    record = Record(0, 0.0)
    try:
        async with asyncio.timeout(seconds):
            await send(session, target, body, record, asyncio.get_running_loop().time())
    except TimeoutError:
        raise EngineError(f"{target.url}: no answer to the first request within {seconds:.0f} s") from None
    if record.error:
        raise _refusal(target, record)


def _refusal(target: Target, record: Record) -> LineshaftError:
    """The error that says whose fault a failed first request is."""
    said = f"{target.url}: {record.error}: {record.detail}"
    match record.error:
        case "http 401" | "http 403":
            return ConfigError(f"{said}; the key is taken from OPENAI_API_KEY, which is {'set' if target.key else 'not set'}")
        case "http 404":
            return UnknownModel(said)
        case "http 429":
            return Capacity(said)
        case "http 400" | "http 422" | "http 413" | "http 415":
            return RequestError(f"{said}; --set workload.prompts=text and --set workload.ignore_eos=false ask for less")
        case _:
            return EngineError(said)
