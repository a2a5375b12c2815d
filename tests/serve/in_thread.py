"""A fake engine in a thread of the test, at the other end of a socket: what a process of its own is for the server."""

import socket
import threading
from contextlib import suppress
from pathlib import Path

from fake_engine import tokenizer

from lineshaft.engine.config import EngineConfig
from lineshaft.serve.child import serve_engine
from lineshaft.serve.frames import Channel, Ready
from lineshaft.serve.remote import RemoteEngine
from lineshaft.serve.served import Served


async def in_thread(load, stall_seconds=60.0):
    """The engine that `load` makes, which may raise an error of ours."""
    ours, theirs = socket.socketpair()

    def run():
        with theirs, suppress(BrokenPipeError, ConnectionResetError):
            serve_engine(Channel(theirs), lambda _: ready(load()))

    threading.Thread(target=run, daemon=True).start()
    remote = await RemoteEngine.connected(ours, stall_seconds, Path(), EngineConfig())
    await remote.wait_ready()
    return Served(remote, tokenizer())


def ready(engine):
    return engine, Ready(engine.context_tokens, 0, 0.0, 0.0, [])
