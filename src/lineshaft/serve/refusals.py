"""Errors as answers: the status and the OpenAI-shaped body for each error that a request can meet."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.responses import Response

from lineshaft.base.errors import Capacity, LineshaftError, RequestError
from lineshaft.serve.replies import ErrorAnswer, ErrorDetail

E = TypeVar("E", RequestError, Capacity)

RETRY_AFTER_S = 1
"""What we ask clients to wait for after 408, 429 and 503: a request takes seconds, a restart of the engine little more."""
_SLOW_BODY = "body_timeout"


def body_too_large(limit: int) -> RequestError:
    """The request's body is larger than the server reads."""
    return _as(413, "request_too_large", RequestError(f"the body is larger than {limit} bytes, which is the limit of this server"))


def wrong_content(kind: str) -> RequestError:
    """The request's body is not declared as JSON."""
    return _as(415, "unsupported_media_type", RequestError(f'the body must be "content-type: application/json", not "{kind}"'))


def body_too_slow(seconds: float) -> Capacity:
    """The request's body did not arrive in time."""
    told = f"the body did not arrive within {seconds:g} s, which is the limit of this server: send it again"
    return _as(408, _SLOW_BODY, Capacity(told))


def took_too_long(seconds: float) -> Capacity:
    """The answer was not complete in time; the engine no longer works on it."""
    told = f"no whole answer within {seconds:g} s, which is the limit of this server: lower max_tokens, stream, or try again later"
    return _as(408, "request_timeout", Capacity(told))


def too_many_tokens(asked: int, limit: int) -> RequestError:
    """Prompts and answers together are more than the server computes for one request."""
    told = f"the request asks for {asked} tokens (prompts and answers together), the limit of this server is {limit}: shorten or split it"
    return _as(413, "too_many_tokens", RequestError(told))


def not_ready(why: str) -> Capacity:
    """The server runs but can't answer now: the model loads, has failed, or the server is stopping."""
    return _as(503, "not_ready", Capacity(why))


def _as(status: int, code: str, error: E) -> E:
    error.status, error.code = status, code
    return error


def status_of(error: LineshaftError) -> int:
    """HTTP status of an error; 500 for those that are not the client's doing."""
    return error.status if isinstance(error, RequestError | Capacity) else 500


def error_answer(error: LineshaftError) -> ErrorAnswer:
    """The body that says what was wrong, in OpenAI's shape."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    kind = {408: "timeout_error", Capacity.status: "rate_limit_error"}.get(status_of(error), kind)
    code = error.code if isinstance(error, RequestError | Capacity) else "engine_error"
    return ErrorAnswer(ErrorDetail(str(error), kind, error.param if isinstance(error, RequestError) else None, code))


def refusal(error: LineshaftError) -> Response:
    """The whole HTTP answer for an error."""
    status = status_of(error)
    headers = {"retry-after": str(RETRY_AFTER_S)} if isinstance(error, Capacity) else {}
    if isinstance(error, Capacity) and error.code == _SLOW_BODY:
        headers["connection"] = "close"  # else the connection would wait for the rest
    return Response(msgspec.json.encode(error_answer(error)), status, headers, "application/json")


def plain_refusal(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    """An answer for what HTTP itself refuses, such as an unknown path."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Response(msgspec.json.encode(ErrorAnswer(ErrorDetail(message, kind, None, code))), status, headers, "application/json")
