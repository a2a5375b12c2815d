"""The HTTP interface: OpenAI's endpoints and the probes, as a Starlette application over a `Worker`.

Order of a request: read the body (limited) -> `read` checks it -> the worker's engine -> `answer` makes text of tokens ->
`voice` words it. An error before the first token is an HTTP status; after it, an event in the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lineshaft.base.errors import LineshaftError, UnknownModel
from lineshaft.sched.request import Ask
from lineshaft.serve import metrics
from lineshaft.serve.answer import Telling, texts
from lineshaft.serve.read import Job, chat_job, completion_job, read_chat, read_completion
from lineshaft.serve.refusals import body_too_large, error_answer, plain_refusal, refusal, wrong_content
from lineshaft.serve.voice import ChatVoice, CompletionVoice, Voice
from lineshaft.serve.wire import Asked, ModelCard, ModelList
from lineshaft.serve.worker import Worker

T = TypeVar("T")
A = TypeVar("A", bound=Asked)

STOP_SECONDS = 5.0
"""How long the end of the server waits for the engine's present step."""
_GONE = 499
"""What nginx calls a client that closed the connection; nobody reads it."""


class Api:
    """The endpoints for one served model."""

    def __init__(self, worker: Worker, model: str, instruments: metrics.Metrics, max_body_bytes: int) -> None:
        self._worker, self._model, self._metrics = worker, model, instruments
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The application. It loads the model when it starts up and ends the engine when it shuts down."""
        post, get = ["POST"], ["GET"]
        app = Starlette(
            routes=[
                Route("/v1/completions", self._completion, methods=post),
                Route("/v1/chat/completions", self._chat, methods=post),
                Route("/v1/models", self._models, methods=get),
                Route("/v1/models/{name:path}", self._one_model, methods=get),
                Route("/health", self._health, methods=get),
                Route("/ready", self._ready, methods=get),
                Route("/metrics", self._exposition, methods=get),
            ],
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

    async def _completion(self, request: Request) -> Response:
        arrived = time.monotonic()
        asked = read_completion(await self._body(request))
        return await self._answer(request, asked, completion_job, CompletionVoice(self._model), arrived)

    async def _chat(self, request: Request) -> Response:
        arrived = time.monotonic()
        asked = read_chat(await self._body(request))
        return await self._answer(request, asked, chat_job, ChatVoice(self._model), arrived)

    async def _answer(self, request: Request, asked: A, plan: Callable[..., Job], voice: Voice, arrived: float) -> Response:
        if asked.model != self._model:
            raise UnknownModel(f'the model "{asked.model}" is not served here; this server has "{self._model}"', "model")
        served = self._worker.model()
        job = await asyncio.to_thread(plan, asked, served.tokenizer, served.engine.context_tokens)  # long prompts take a while
        (ticket,) = self._worker.submit(Ask(job.prompt, job.sampling), arrived)
        telling = Telling(served.tokenizer, job.stops)
        pieces = texts(ticket, telling)
        with ExitStack() as held:
            held.callback(self._worker.release, ticket)
            first = await _unless_gone(request, anext(pieces))
            if asked.stream:
                counted = len(job.prompt) if asked.stream_options and asked.stream_options.include_usage else None
                return _EventStream(self._chunks(voice, first, pieces, telling, counted), held.pop_all().close)
            text = first + await _unless_gone(request, _joined(pieces))
            assert telling.finish is not None  # what else would have ended the pieces?
            return _json(voice.whole(text, telling.finish, telling.usage(len(job.prompt))))

    async def _chunks(
        self, voice: Voice, first: str, rest: AsyncIterator[str], telling: Telling, prompt_tokens: int | None
    ) -> AsyncIterator[bytes]:
        """The events of a stream; with the token counts at its end unless `prompt_tokens` is None."""
        for chunk in voice.opening():
            yield _event(chunk)
        try:
            if first or telling.finish:
                yield _event(voice.piece(first, telling.finish))
            async for text in rest:
                if text or telling.finish:
                    yield _event(voice.piece(text, telling.finish))
            if prompt_tokens is not None:
                yield _event(voice.closing(telling.usage(prompt_tokens)))
        except LineshaftError as error:
            yield _event(error_answer(error))
        yield b"data: [DONE]\n\n"

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise wrong_content(kind)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise body_too_large(self._max_body_bytes)
        return bytes(body)

    # -- what is served, and how it fares ---------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        return _json(ModelList([self._card()]))

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            raise UnknownModel(f'this server has only the model "{self._model}"', "model")
        return _json(self._card())

    def _card(self) -> ModelCard:
        context = self._worker.context_tokens
        return ModelCard(self._model, self._created, msgspec.UNSET if context is None else context)

    async def _health(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        self._worker.must_be_ready()
        return _json({"status": "ready"})

    async def _exposition(self, _: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    # -- refusals ---------------------------------------------------------------------------------------------------

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, LineshaftError)
        return self._counted(refusal(error))

    async def _no_such_thing(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return self._counted(plain_refusal(error.status_code, message, code, dict(error.headers or {})))

    async def _our_fault(self, _: Request, __: Exception) -> Response:
        return self._counted(plain_refusal(500, "the server failed on this request; its log says why", "internal_error"))

    def _counted(self, response: Response) -> Response:
        self._metrics.count("lineshaft:http_errors", status=str(response.status_code))
        return response


class _EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however they end, also before their first chunk."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], let_go: Callable[[], None]) -> None:
        super().__init__(chunks, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._let_go = let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._let_go()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
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


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _joined(pieces: AsyncIterator[str]) -> str:
    return "".join([text async for text in pieces])


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _event(answer: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(answer) + b"\n\n"
