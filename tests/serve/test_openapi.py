"""The OpenAPI document is what the server does: schemathesis tries it out."""

import functools

import jsonschema
import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from world import MODEL, serving

from lineshaft.serve.api import Api
from lineshaft.serve.endpoints import ENDPOINTS
from lineshaft.serve.limits import Limits
from lineshaft.serve.metrics import Metrics
from lineshaft.serve.openapi import document

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SECONDS = 10
"""An answer that takes longer counts as a hang."""


def named(schema):
    """The document with the one model's name in it: else nearly every request would be a 404."""
    for component in schema["components"]["schemas"].values():
        if "model" in component.get("properties", {}) and component.get("additionalProperties") is False:
            component["properties"]["model"] = {"enum": [MODEL]}
    return schema


@functools.cache
def described():
    return schemathesis.openapi.from_dict(named(document()))


@pytest.fixture(scope="module")
def patient():
    """A server with a short context, so that few answers are long."""
    with serving(FakeEngine(text="ok 价格", context_tokens=4000), limits=Limits(max_request_tokens=20_000)) as running:
        yield running


def test_every_route_is_described_and_everything_described_is_a_route():
    app = Api(FakeWorker(), MODEL, Metrics(MODEL), Limits()).app()
    routes = {(route.path.replace(":path", ""), method.lower()) for route in app.routes for method in route.methods - {"HEAD"}}
    assert routes == {(path, method) for path, item in document()["paths"].items() for method in item}
    assert len(routes) == len(ENDPOINTS)


class FakeWorker:
    """Enough to build the routes."""


def test_the_document_is_served_and_its_schemas_are_valid(world):
    status, _, told = world.call("GET", "/openapi.json")
    assert status == 200
    assert told == document()
    assert told["openapi"].startswith("3.1")
    for component in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(component)


def test_every_refusal_is_declared_with_its_shape_and_when_to_come_back():
    operation = document()["paths"]["/v1/completions"]["post"]
    assert set(operation["responses"]) == {"200", "400", "404", "405", "408", "413", "415", "429", "500", "503"}
    assert all("Retry-After" in operation["responses"][status]["headers"] for status in ("408", "429", "503"))


def test_fields_that_are_taken_only_when_they_ask_for_nothing_say_so():
    chat = document()["components"]["schemas"]["ChatAsked"]["properties"]
    assert chat["tools"] == {"enum": [[], None]}
    assert "enum" not in chat["logprobs"]


PLAN = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate], "suppress_health_check": list(HealthCheck)}


@described().parametrize()
@settings(max_examples=50, **PLAN)
def test_nothing_that_follows_the_document_breaks_the_server(case, patient):
    nothing_breaks(case, patient)


@pytest.mark.slow  # the same, with more examples
@described().parametrize()
@settings(max_examples=150, **PLAN)
def test_nothing_at_length_either(case, patient):
    nothing_breaks(case, patient)


def nothing_breaks(case, patient):
    answer = case.call(base_url=patient.url, timeout=SECONDS)
    case.validate_response(answer, checks=CHECKS)
    assert patient.worker.state == "ready"
