"""The open loop: every request is sent when it is due, whatever has become of those before it. Called by `bench`.

A closed loop sends the next request when the last one is answered. It slows down with the server, so a stall delays one
request and hides all that users would have sent meanwhile (coordinated omission). Here the schedule is fixed beforehand,
latencies count from it, and how late this client itself was is measured and reported.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lineshaft.evaluate.load.record import Record

Send = Callable[[Record, float], Awaitable[None]]
"""Sends one request and fills its record; the number is when the run began, by the clock of the event loop."""
Prepare = Callable[[int], Send]
"""Makes a request ready; called shortly before it is due, so that making it delays nothing."""

BEAT_SECONDS = 0.05
"""How often this client looks whether it wakes up in time."""
_LEAD_SECONDS = 0.02
"""Between the call and second 0 of the run, for the first request to be made ready."""


@dataclass
class Sent:
    """What came of a run."""

    records: list[Record] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    """Seconds by which this client woke up late, at every beat: what it was late by in sending and in timing."""
    seconds: float = 0.0
    """From second 0 until the last answer or the interruption."""
    interrupted: bool = False
    """Whether Ctrl-C ended it early."""


async def offer(times: Sequence[float], prepare: Prepare, timeout: float, on_end: Callable[[Record], None]) -> Sent:
    """Send a request at each of `times` (seconds, ascending) and wait until all have ended.

    A request ends as a `timeout` that many seconds after it was due, so a run lasts max(times) + timeout at most.
    Cancelling (Ctrl-C) ends the run; what was measured until then is returned.
    """
    loop = asyncio.get_running_loop()
    sent, start = Sent(), loop.time() + _LEAD_SECONDS
    beat = loop.create_task(_beat(sent.lateness))
    try:
        with _no_collection():
            async with asyncio.TaskGroup() as group:
                for number, at in enumerate(times):
                    send = prepare(number)
                    await _until(start + at)
                    sent.records.append(Record(number, at))
                    group.create_task(_one(send, sent.records[-1], start, timeout, on_end))
    except asyncio.CancelledError:
        sent.interrupted = True
    finally:
        sent.seconds = loop.time() - start
        beat.cancel()
    return sent


async def _until(when: float) -> None:
    """Wait; at least let others run, for a client that is behind must still read what comes."""
    await asyncio.sleep(max(0.0, when - asyncio.get_running_loop().time()))


async def _one(send: Send, record: Record, start: float, timeout: float, on_end: Callable[[Record], None]) -> None:
    try:
        async with asyncio.timeout_at(start + record.scheduled + timeout):
            await send(record, start)
    except TimeoutError:
        if record.ended is None:  # else only the connection stayed open
            record.error, record.detail = "timeout", f"not answered {timeout:g} s after it was due"
    on_end(record)


async def _beat(lateness: list[float]) -> None:
    """Beats are due at fixed times, as the requests are: a halt of a second is twenty late ones, and not one."""
    due = asyncio.get_running_loop().time()
    while True:
        due += BEAT_SECONDS
        await _until(due)
        lateness.append(max(0.0, asyncio.get_running_loop().time() - due))


@contextmanager
def _no_collection() -> Iterator[None]:
    """What exists already is never looked through by the garbage collector while times are taken: that takes tens of ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
