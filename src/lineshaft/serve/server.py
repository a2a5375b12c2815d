"""The server process: listens at once, loads the model behind a red `/ready`, drains on SIGTERM.

`/health` says that the process lives, `/ready` that it can answer now. On the first SIGTERM or SIGINT `/ready` turns
red and new requests are refused, answers under way may end within `drain_seconds`, then the process ends with status 0.
A second signal ends it at once.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
import uvicorn.config
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from lineshaft.base.config import Config, merge
from lineshaft.base.errors import ConfigError
from lineshaft.base.terminal import say
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.api import Api
from lineshaft.serve.limits import Limits
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.served import Served
from lineshaft.serve.starting import started
from lineshaft.serve.worker import Worker

_BACKLOG = 2048
_LOG_CONFIG = merge(uvicorn.config.LOGGING_CONFIG, {"handlers": {"access": {"stream": "ext://sys.stderr"}}})
_LAST_WORDS_S = 2
"""How long connections may take to close once their answers have been given or refused."""


class ServeConfig(Config):
    """How the server listens and what it lets in."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only. There is no access control: see a gateway for that."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes any free one."""
    model_name: str | None = None
    """Name that clients ask for; by default the name of what is served."""
    limits: Limits = Limits()
    """Bounds on one request."""
    max_waiting: PositiveInt = 256
    """Requests that may wait for the engine; more are refused with 429."""
    engine_stall_seconds: PositiveFloat = 300.0
    """An engine that has work and finishes no step in so long is ended and started again."""
    drain_seconds: NonNegativeFloat = 30.0
    """How long answers under way may go on after SIGTERM."""
    access_log: bool = False
    """Write a line for each request (address, path and status, never its content) to stderr."""


def run_server(
    folder: Path, name: str, config: ServeConfig, engine: EngineConfig, *, on_listening: Callable[[int], None] = lambda _: None
) -> None:
    """Serve the checkpoint in `folder` as `name` until SIGTERM or SIGINT.

    `on_listening` is told the port once connections are taken. Raises ConfigError when it can't listen there, BrokenContract when
    the tokenizer gives other tokens than the model was trained on, DoesNotFit when there is too little memory, and whatever
    loading the model raises.
    """

    def start(metrics: Metrics) -> Awaitable[Served]:
        return started(folder, engine, config.engine_stall_seconds, metrics)

    serve_until_stopped(start, config.model_name or name, config, on_listening=on_listening)


def serve_until_stopped(
    start: Callable[[Metrics], Awaitable[Served]], model: str, config: ServeConfig, *, on_listening: Callable[[int], None]
) -> None:
    """`run_server` for any way to start an engine. Call it in the main thread, which receives signals."""
    metrics = Metrics(model)
    worker = Worker(lambda: start(metrics), metrics, config.max_waiting, on_ready=lambda seconds: say(f"ready in {seconds:.1f} s"))
    with _listening(config) as listener:
        port = listener.getsockname()[1]
        say(f"listening on http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}")
        on_listening(port)
        _Server(worker, Api(worker, model, metrics, config.limits), config).run([listener])
    if worker.failure:
        raise worker.failure


@contextmanager
def _listening(config: ServeConfig) -> Generator[socket.socket]:
    """A socket that takes connections from now on."""
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {config.host} port {config.port}: {error.strerror or error}; choose another port, or 0 for any free one"
        ) from None
    with listener:
        yield listener


class _Server(uvicorn.Server):
    """uvicorn with our way to stop: drain first, and end with status 0 instead of by the signal."""

    def __init__(self, worker: Worker, api: Api, config: ServeConfig) -> None:
        super().__init__(
            uvicorn.Config(
                api.app(),
                lifespan="on",
                log_level="info" if config.access_log else "warning",
                log_config=_LOG_CONFIG,
                access_log=config.access_log,
                server_header=False,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )
        self._worker, self._drain_seconds = worker, config.drain_seconds
        self._deadline: float | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Answer SIGTERM and SIGINT for as long as the server runs; unlike uvicorn, without dying of them afterwards."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, stop."""
        now = time.monotonic()
        self._deadline = now if self._deadline is not None else now + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. True ends the server."""
        if self._worker.failure:
            return True
        if self._deadline is not None:
            self._worker.drain()
            if not self._worker.in_flight or time.monotonic() >= self._deadline:
                self._worker.stop()
                return True
        return await super().on_tick(counter)
