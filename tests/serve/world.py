"""A server on loopback around a fake engine."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
import openai
import uvicorn
from fake_engine import FakeEngine
from in_thread import in_thread

from lineshaft.base.errors import BadCheckpoint
from lineshaft.serve.api import Api
from lineshaft.serve.limits import Limits
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.worker import Worker

MODEL = "fake-1"


def until(condition, seconds=15):
    """Look again and again until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)  # lets the other threads run


@dataclass
class World:
    """A running server and the engines it was given, the latest last."""

    url: str
    engines: list[FakeEngine]
    worker: Worker

    @property
    def engine(self):
        return self.engines[-1]

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, **options)

    def call(self, method, path, **options):
        """Status, headers and JSON (or text) of one request."""
        return asyncio.run(self._call(method, path, options))

    def post(self, path, body):
        return self.call("POST", path, json=body)

    async def _call(self, method, path, options):
        async with aiohttp.ClientSession() as session, session.request(method, self.url + path, **options) as answer:
            json = answer.content_type == "application/json"
            return answer.status, answer.headers, await (answer.json() if json else answer.text())


@contextmanager
def serving(*engines, max_waiting=64, limits=None, load=None):
    """Serve with these engines, each taking over when the one before has failed."""
    left, used = list(engines), []

    def following():
        if not left:
            raise BadCheckpoint("no engine is left")
        used.append(left.pop(0))
        return used[-1]

    metrics = Metrics(MODEL)
    worker = Worker(lambda: in_thread(load or following), metrics, max_waiting)
    app = Api(worker, MODEL, metrics, limits or Limits(max_body_bytes=1 << 20)).app()
    config = uvicorn.Config(app, lifespan="on", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        world = World(f"http://127.0.0.1:{listener.getsockname()[1]}", used, worker)
        until(lambda: load is not None or worker.state == "ready")
        yield world
    finally:
        for engine in used:
            if engine.gate:
                engine.gate.release(10_000)
        server.should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive()
