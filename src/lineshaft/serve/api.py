"""The HTTP interface: OpenAI's and vLLM's endpoints and the probes, as a Starlette application over a `Worker`.

Order of a request: `web` reads the body (limited) -> `read` checks its shape -> `job` makes of it what the engine is asked ->
the worker's engine -> `answer` makes text of tokens -> `voice` words it. An error before the first token is an HTTP status;
after it, an event in the stream.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lineshaft.base.errors import LineshaftError, UnknownModel
from lineshaft.serve import metrics
from lineshaft.serve.endpoints import ENDPOINTS
from lineshaft.serve.limits import Limits
from lineshaft.serve.openapi import encoded
from lineshaft.serve.pending import Pending
from lineshaft.serve.read import shown
from lineshaft.serve.refusals import plain_refusal, refusal
from lineshaft.serve.replies import ModelCard, ModelList, Status, Version
from lineshaft.serve.service import Service
from lineshaft.serve.web import EventStream, as_json, body_of, unless_gone
from lineshaft.serve.worker import Worker

STOP_SECONDS = 5.0
"""How long the end of the server waits for the engine's present step."""
_GONE = 499
"""What nginx calls a client that closed the connection; nobody reads it."""
_SLOW_READER_SECONDS = 30.0
"""How long after its deadline a stream may take to be read to its end."""


class Api:
    """The endpoints for one served model."""

    def __init__(self, worker: Worker, model: str, instruments: metrics.Metrics, limits: Limits) -> None:
        self._worker, self._model, self._metrics, self._limits = worker, model, instruments, limits
        self._service = Service(worker, model, limits)
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The application. It loads the model when it starts up and ends the engine when it shuts down."""
        handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "completion": partial(self._text, self._service.completion),
            "chat": partial(self._text, self._service.chat),
            "embeddings": self._embeddings,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "models": self._models,
            "one_model": self._one_model,
            "health": self._health,
            "ready": self._ready,
            "metrics": self._exposition,
            "version": self._version,
            "openapi": self._openapi,
        }
        app = Starlette(
            # a model's name may hold slashes
            routes=[Route(item.path.replace("{name}", "{name:path}"), handlers[item.name], methods=[item.method]) for item in ENDPOINTS],
            exception_handlers={
                LineshaftError: self._refused,
                HTTPException: self._no_such_thing,
                ClientDisconnect: _nobody,
                Exception: self._our_fault,
            },
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._worker.start()
        yield
        self._worker.stop()
        await self._worker.join(STOP_SECONDS)

    # -- answers of the model ---------------------------------------------------------------------------------------

    async def _text(self, begin: Callable[[bytes, float], Awaitable[Pending]], request: Request) -> Response:
        arrived = time.monotonic()
        pending = await begin(await body_of(request, self._limits), arrived)
        with ExitStack() as held:
            held.callback(pending.close, self._worker.release)
            if not pending.streamed:
                return as_json(await unless_gone(request, pending.whole()))
            await unless_gone(request, pending.begin())
            return EventStream(pending.events(), held.pop_all().close, self._limits.request_seconds + _SLOW_READER_SECONDS)

    async def _embeddings(self, request: Request) -> Response:
        arrived = time.monotonic()
        return as_json(await unless_gone(request, self._service.embeddings(await body_of(request, self._limits), arrived)))

    async def _tokenize(self, request: Request) -> Response:
        return as_json(await self._service.tokenize(await body_of(request, self._limits)))

    async def _detokenize(self, request: Request) -> Response:
        return as_json(await self._service.detokenize(await body_of(request, self._limits)))

    # -- what is served, and how it fares ---------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        return as_json(ModelList([self._card()]))

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            raise UnknownModel(f'this server has only the model "{self._model}"', "model")
        return as_json(self._card())

    def _card(self) -> ModelCard:
        context = self._worker.context_tokens
        return ModelCard(self._model, self._created, msgspec.UNSET if context is None else context)

    async def _health(self, _: Request) -> Response:
        return as_json(Status("ok"))

    async def _ready(self, _: Request) -> Response:
        self._worker.must_be_ready()
        return as_json(Status("ready"))

    async def _exposition(self, _: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    async def _version(self, _: Request) -> Response:
        return as_json(Version(importlib.metadata.version("lineshaft")))

    async def _openapi(self, _: Request) -> Response:
        return Response(encoded(), media_type="application/json")

    # -- refusals ---------------------------------------------------------------------------------------------------

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, LineshaftError)
        return self._counted(refusal(error))

    async def _no_such_thing(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {shown(request.url.path)}: {error.detail}"
        return self._counted(plain_refusal(error.status_code, message, code, dict(error.headers or {})))

    async def _our_fault(self, _: Request, __: Exception) -> Response:
        return self._counted(plain_refusal(500, "the server failed on this request; its log says why", "internal_error"))

    def _counted(self, response: Response) -> Response:
        self._metrics.count("lineshaft:http_errors", status=str(response.status_code))
        return response


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)
