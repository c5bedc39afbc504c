"""The server's own OpenAPI is whole and right: routes, parameters, bodies, answers and refusals."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from fastapi import APIRouter
from fastapi._compat import ModelField
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Param
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.batch import Endpoint
from jobs.errors import InvalidRequestError
from jobs.settings import Settings
from server.app import create_app
from server.batch_request import parse_batch_request
from server.deps import _json_body
from server.routes import OPEN_ROUTES, ROUTES
from server.upload_request import parse_completion, parse_upload_request
from tests.support.box import completion_line
from tests.support.service import COMPLETIONS, FINAL, Service
from tests.support.wire import form

ENVELOPE = "#/components/schemas/ErrorEnvelope"
RIDERS = {f"POST {endpoint}" for endpoint in Endpoint}
"""They read their bodies when a place is free."""
FORMS = {"POST /v1/files", "POST /v1/uploads/{upload_id}/parts"}
BESIDE = {("GET /v1/files/{file_id}/content", name) for name in ("range", "if-range")}
"""Parameters that no signature has: the whole head is handed on."""


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return create_app(Settings(state_dir=Path("/nowhere"))).openapi()


def operations(openapi: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }


def table(*routers: APIRouter) -> dict[str, APIRoute]:
    """Of all routes, if none of their tables is named."""
    return {
        f"{method} {route.path_format}": route
        for router in routers or (*ROUTES, *OPEN_ROUTES)
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }


def test_it_has_every_route_and_no_other(openapi: dict[str, Any]) -> None:
    assert set(operations(openapi)) == set(table())


def test_it_says_who_asks_for_a_key(openapi: dict[str, Any]) -> None:
    asking = {name for name, each in operations(openapi).items() if each.get("security")}
    assert asking == set(table(*ROUTES))
    (scheme,) = openapi["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def read_of(field: ModelField) -> tuple[str, str, bool]:
    """Place, name and need of a parameter as the route's function takes it."""
    info = field.field_info
    assert isinstance(info, Param)
    place = info.in_.value
    name = field.alias.replace("_", "-") if place == "header" else field.alias
    return place, name, info.is_required()


def test_it_has_every_parameter_with_its_place_and_need(openapi: dict[str, Any]) -> None:
    for name, operation in operations(openapi).items():
        taken = {read_of(field) for field in get_flat_params(table()[name].dependant)}
        told = {
            (each["in"], each["name"], each["required"]) for each in operation.get("parameters", [])
        }
        beside = {("header", each, False) for route, each in BESIDE if route == name}
        assert told == taken | beside, name
        assert all("schema" in each for each in operation.get("parameters", []))


def test_whoever_reads_a_body_says_which(openapi: dict[str, Any]) -> None:
    for name, operation in operations(openapi).items():
        calls = {each.call for each in table()[name].dependant.dependencies}
        kind = "application/json" if _json_body in calls or name in RIDERS else None
        kind = "multipart/form-data" if name in FORMS else kind
        body = operation.get("requestBody")
        assert (body is not None) == (kind is not None), name
        if body is not None:
            assert (list(body["content"]), body["required"]) == ([kind], True)
            schema = body["content"][kind]["schema"]
            assert set(schema["required"]) <= set(schema["properties"])
            assert schema["type"] == "object"


def test_every_answer_has_its_shape_and_every_refusal_the_envelope(openapi: dict[str, Any]) -> None:
    for name, operation in operations(openapi).items():
        answers = operation["responses"]
        assert set(answers) - {"206"} == {"200", "4XX", "5XX"}, name
        for status in ("4XX", "5XX"):
            assert answers[status]["content"]["application/json"]["schema"] == {"$ref": ENVELOPE}
        assert answers["200"]["content"], name
        for content in answers["200"]["content"].values():
            assert content.get("schema"), name


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_reference_leads_somewhere(openapi: dict[str, Any]) -> None:
    found = set(references(openapi))
    schemas = openapi["components"]["schemas"]
    assert found <= {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


# JSON alone: 1.0 is an integer to a schema and none to us, and a schema cannot speak of surrogates
# or control characters.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=70)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda number: not number.is_integer()
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
expiries = st.fixed_dictionaries(
    {"anchor": st.just("created_at"), "seconds": st.sampled_from([3_599, 3_600, 2_592_000])}
)
PARSERS: dict[str, tuple[Callable[[bytes], object], dict[str, Any], dict[str, Any]]] = {
    "/v1/batches": (
        parse_batch_request,
        {
            "input_file_id": "file-x",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        },
        {
            "metadata": st.dictionaries(texts, texts, max_size=18),
            "output_expires_after": expiries,
        },
    ),
    "/v1/uploads": (
        lambda raw: parse_upload_request(raw, max_batch_bytes=2**40),
        {"filename": "a", "purpose": "batch", "bytes": 1, "mime_type": "t"},
        {"expires_after": expiries, "bytes": st.sampled_from([0, 2**33, 2**33 + 1])},
    ),
    "/v1/uploads/{upload_id}/complete": (
        parse_completion,
        {"part_ids": ["part_x"]},
        {"md5": st.sampled_from(["0" * 32, "0" * 31]), "part_ids": st.lists(texts, max_size=3)},
    ),
}
"""How a body is read, a right one, and what more it may say."""


@pytest.mark.parametrize("path", PARSERS)
def test_the_schema_of_a_body_is_what_the_parser_takes(openapi: dict[str, Any], path: str) -> None:
    content = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    judge = jsonschema.Draft202012Validator(content["schema"])
    parse, right, more = PARSERS[path]
    fields = [
        st.tuples(st.just(name), wish | values)
        for name, wish in ({name: st.just(value) for name, value in right.items()} | more).items()
    ]
    changes = st.lists(st.one_of(*fields, st.tuples(texts, values)), max_size=3).map(dict)
    dropped = st.sets(st.sampled_from(sorted(right)), max_size=1)

    @settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(changes, dropped)
    def agree(changed: dict[str, Any], left_out: set[str]) -> None:
        body = {name: right[name] for name in right if name not in left_out} | changed
        try:
            parse(json.dumps(body).encode())
        except InvalidRequestError:
            assert not judge.is_valid(body), body
        else:
            assert judge.is_valid(body), body

    agree()


def closed(schema: Any) -> Any:
    """The schema with no room for fields that it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


class Witness:
    """Holds each answer against what the OpenAPI says of its operation."""

    def __init__(self, openapi: dict[str, Any]) -> None:
        self._components = closed(copy.deepcopy(openapi["components"]))
        self._operations = operations(openapi)
        self.seen: set[str] = set()

    def __call__(self, answer: httpx2.Response) -> None:
        answer.read()
        name, operation = self._operation(answer.request)
        told = operation["responses"]
        told = told.get(str(answer.status_code)) or told[f"{answer.status_code // 100}XX"]
        kind = answer.headers["content-type"].partition(";")[0]
        schema = told["content"][kind]["schema"]
        if kind == "application/json":
            whole = {**schema, "components": self._components}
            jsonschema.Draft202012Validator(whole).validate(answer.json())
        self.seen.add(f"{name} {answer.status_code}")

    def _operation(self, request: httpx2.Request) -> tuple[str, dict[str, Any]]:
        asked = f"{request.method} {request.url.path}"
        for name, operation in self._operations.items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", name), asked):
                return name, operation
        raise AssertionError(f"{asked} is no operation")


@pytest.fixture
def witness(openapi: dict[str, Any]) -> Witness:
    return Witness(openapi)


@pytest.fixture
def http(service: Service, witness: Witness) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, event_hooks={"response": [witness]}) as client:
        yield client


def test_every_operation_answers_as_it_says(http: httpx2.Client, witness: Witness) -> None:
    """A new route has its place in here."""
    raw = f"{completion_line(0)}\n{completion_line(1, max_tokens=-1)}\n".encode()
    file_id = http.post("/v1/files", **form({"purpose": b"batch", "file": raw})).json()["id"]
    http.get("/v1/files", params={"limit": 2})
    http.get(f"/v1/files/{file_id}")
    http.get(f"/v1/files/{file_id}/content")
    http.get(f"/v1/files/{file_id}/content", headers={"range": "bytes=0-3"})
    upload = {"filename": "a", "purpose": "batch", "bytes": len(raw), "mime_type": "t"}
    upload_id, other_id = (http.post("/v1/uploads", json=upload).json()["id"] for _ in range(2))
    part = http.post(f"/v1/uploads/{upload_id}/parts", **form({"data": raw})).json()
    http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part["id"]]})
    http.post(f"/v1/uploads/{other_id}/cancel")
    wish = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    batch = http.post("/v1/batches", json={**wish, "metadata": {"a": "b"}}).json()
    while batch["status"] not in FINAL:
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    http.get("/v1/batches", params={"limit": 3})
    http.post(f"/v1/batches/{batch['id']}/cancel")
    http.get(f"/v1/batches/{batch['id']}/results")
    http.post(f"/v1/batches/{batch['id']}/retry")
    running = http.post("/v1/batches", json=wish).json()
    http.post(f"/v1/batches/{running['id']}/cancel")
    model = http.get("/v1/models").json()["data"][0]["id"]
    http.get(f"/v1/models/{model}")
    asked = {"prompt": "a", "input": "a", "messages": [{"role": "user", "content": "a"}]}
    for endpoint in Endpoint:
        wanted = "prompt" if endpoint is Endpoint.COMPLETIONS else "input"
        wanted = "messages" if endpoint is Endpoint.CHAT_COMPLETIONS else wanted
        http.post(endpoint.value, json={"model": model, wanted: asked[wanted]})
    http.get("/healthz")
    http.delete(f"/v1/files/{file_id}")
    answered = {name.rpartition(" ")[0] for name in witness.seen if name.endswith("200")}
    assert answered == set(table())
    assert "GET /v1/files/{file_id}/content 206" in witness.seen
    assert "POST /v1/batches/{batch_id}/cancel 409" in witness.seen


def test_every_refusal_is_as_it_says(http: httpx2.Client, witness: Witness) -> None:
    for name in table():
        method, _, path = name.partition(" ")
        answer = http.request(method, re.sub(r"\{\w+\}", "none", path), params={"limit": "many"})
        assert answer.status_code < 500, name
    assert len([name for name in witness.seen if not name.endswith(" 200")]) >= 14
