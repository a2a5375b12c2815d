"""`bench` against the fake server in one loop with a virtual clock."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

from fake_openai import FakeOpenAI, listening
from virtual_loop import VirtualLoop

from lineshaft.base.config import load
from lineshaft.evaluate.load.bench import LoadConfig, Outcome, bench


class Silent:
    def advance(self, steps: int = 1, note: str = "") -> None:
        return


def measured(fake: FakeOpenAI, **settings) -> Outcome:
    """What `bench` makes of the server; the clock of both is virtual."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    context = listening(fake)
    url = loop.run_until_complete(context.__aenter__())

    def hand_out():
        return loop

    try:
        return bench(load(LoadConfig, {"url": url, **settings}), lambda *_: nullcontext(Silent()), hand_out)
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.finish()
        asyncio.set_event_loop(None)
