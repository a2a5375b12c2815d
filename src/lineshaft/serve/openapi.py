"""The OpenAPI document, made from the table of endpoints and the structs that check requests, so that it can't drift from them."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import msgspec

from lineshaft.serve.endpoints import ENDPOINTS, Endpoint
from lineshaft.serve.read import HARMLESS
from lineshaft.serve.replies import ErrorAnswer
from lineshaft.serve.wire import Asked

_REFERENCE = "#/components/schemas/{name}"
_REASONS = {
    400: "The body, or a field of it, is not what it should be",
    404: "Another model is served here",
    405: "Another method",
    408: "The body or the answer took too long",
    413: "The body is too large, or asks for too many tokens",
    415: "The body is not declared as JSON",
    429: "Too many requests wait, or the cache can't hold this one",
    500: "The engine or the server failed on this request",
    503: "Not ready: loading, stopping, or failed",
}
_RETRIED = (408, 429, 503)


def document() -> dict[str, Any]:
    """The document as OpenAPI 3.1 wants it."""
    kinds = _kinds()
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    shapes = dict(zip(kinds, schemas, strict=True))
    for kind in kinds:
        if issubclass(kind, Asked):
            _add_harmless(components[kind.__name__], kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lineshaft",
            "summary": "OpenAI-compatible server for one model",
            "version": importlib.metadata.version("lineshaft"),
        },
        "paths": {item.path: {item.method.lower(): _operation(item, shapes)} for item in ENDPOINTS},
        "components": {"schemas": components},
    }


@functools.cache
def encoded() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document())


def _kinds() -> list[type]:
    found: list[type] = [ErrorAnswer]
    for item in ENDPOINTS:
        found += [*item.bodies, *[kind for kind in (item.answer, item.chunk) if isinstance(kind, type)]]
    return list(dict.fromkeys(found))


def _add_harmless(component: dict[str, Any], kind: type[Asked]) -> None:
    """Fields that are taken with the values that ask for nothing, and null, which every field may be."""
    for name in HARMLESS.keys() - set(kind.__struct_fields__):
        component["properties"][name] = {"enum": [*HARMLESS[name], None]}


def _operation(item: Endpoint, shapes: dict[type, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "The answer", "content": _content(item, shapes)}}
    for status in sorted({*item.errors, 405}):
        answers[str(status)] = _refusal(status, shapes[ErrorAnswer])
    operation: dict[str, Any] = {"operationId": item.name, "summary": item.summary, "responses": answers}
    if item.parameters:
        operation["parameters"] = item.parameters
    if item.bodies:
        schema = _one_of([shapes[kind] for kind in item.bodies])
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _content(item: Endpoint, shapes: dict[type, Any]) -> dict[str, Any]:
    if isinstance(item.answer, str):
        return {item.answer: {"schema": {"type": "string"} if item.answer.startswith("text/") else {"type": "object"}}}
    content: dict[str, Any] = {"application/json": {"schema": shapes[item.answer]}}
    if item.chunk:
        told = f"A {item.chunk.__name__}, or an ErrorAnswer that ends the stream, as JSON; [DONE] in the last event"
        data = {"type": "string", "description": told}
        content["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return content


def _refusal(status: int, shape: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"description": _REASONS[status], "content": {"application/json": {"schema": shape}}}
    if status in _RETRIED:
        told["headers"] = {"Retry-After": {"description": "Seconds to wait for before another try", "schema": {"type": "integer"}}}
    return told


def _one_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
