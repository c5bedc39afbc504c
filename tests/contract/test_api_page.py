"""`docs/api.md` says what the program does: its tables against routes, schemas, types and codes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from jobs.openai import (
    BatchObject,
    FileObject,
    ModelObject,
    PartObject,
    ProgressObject,
    UploadObject,
)
from jobs.parameters import PARAMETERS
from jobs.settings import Settings
from server.app import create_app
from server.batch_request import COMPLETION_WINDOWS_S

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "api.md").read_text()
_REF = re.compile(r"`([^`]+)`")
OBJECTS: dict[str, type[BaseModel]] = {
    "file": FileObject,
    "upload": UploadObject,
    "part": PartObject,
    "batch": BatchObject,
    "model": ModelObject,
}


def table(head: str) -> list[list[str]]:
    """The cells of the rows of the table whose first line begins so."""
    lines = iter(_PAGE.splitlines())
    assert any(line.startswith(f"| {head} |") for line in lines), head
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return create_app(Settings(state_dir=Path("/nowhere"))).openapi()


def operations(openapi: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def parameters(openapi: dict[str, Any]) -> set[tuple[str, str]]:
    """Route and name of all that may be given beside ids in paths; bodies of lines have a page of
    their own.
    """
    found = set()
    for route, operation in operations(openapi):
        if route.removeprefix("POST ") in PARAMETERS:
            continue
        for parameter in operation.get("parameters", []):
            if parameter["in"] != "path":
                found.add((route, parameter["name"]))
        for content in operation.get("requestBody", {}).get("content", {}).values():
            found |= {(route, name) for name in content["schema"]["properties"]}
    return found


def test_the_page_has_all_routes_and_no_other(openapi: dict[str, Any]) -> None:
    told = [_REF.findall(row[0])[0] for row in table("route")]
    assert len(told) == len(set(told))
    assert set(told) == {route for route, _ in operations(openapi)}


def test_the_page_has_all_parameters_and_no_other(openapi: dict[str, Any]) -> None:
    told = [(_REF.findall(row[0])[0], _REF.findall(row[1])[0]) for row in table("where")]
    assert len(told) == len(set(told))
    assert set(told) == parameters(openapi)


def test_requests_outside_batches_may_have_what_lines_may(openapi: dict[str, Any]) -> None:
    for endpoint, table_of_lines in PARAMETERS.items():
        body = openapi["paths"][endpoint]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == {each.name for each in table_of_lines}
        assert "model" in schema["required"]


def test_the_page_names_every_supported_value(openapi: dict[str, Any]) -> None:
    notes = {(row[0].strip("`"), row[1].strip("`")): row[3] for row in table("where")}
    for route, operation in operations(openapi):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for name, schema in content["schema"]["properties"].items():
                for value in schema.get("enum", []):
                    assert f"`{value}`" in notes[route, name]
    assert list(COMPLETION_WINDOWS_S) == ["24h"]


def test_the_page_has_all_fields_in_their_order() -> None:
    told = {row[0]: _REF.findall(row[1]) for row in table("object")}
    assert told == {name: list(kind.model_fields) for name, kind in OBJECTS.items()}


def test_the_page_explains_every_field_of_progress() -> None:
    told = [name for row in table("field of `progress`") for name in _REF.findall(row[0])]
    assert told == list(ProgressObject.model_fields)


def test_the_page_has_all_statuses() -> None:
    told = {int(row[0]) for row in table("status")}
    source = (_ROOT / "server" / "errors.py").read_text()
    answered = {int(number) for number in re.findall(r"_Answer\(status=(\d{3})", source)}
    answered |= {int(number) for number in re.findall(r"\benvelope\(\s*(\d{3})", source)}
    assert told == answered


def codes_in(*files: str) -> set[str]:
    """What is written as a code in those files."""
    found = set()
    for name in files:
        source = (_ROOT / name).read_text()
        found |= set(re.findall(r'code="([a-z_]+)"', source))
        for suffix in re.findall(r'code=f"\{kind\}_([a-z_]+_value)"', source):
            found.add(f"integer_{suffix}")
    return found


def told_codes(head: str) -> set[str]:
    return {_REF.findall(row[0])[0] for row in table(head)}


def test_the_page_has_all_codes_of_requests() -> None:
    server = [str(path.relative_to(_ROOT)) for path in (_ROOT / "server").rglob("*.py")]
    ledger = [str(path.relative_to(_ROOT)) for path in (_ROOT / "jobs" / "ledger").glob("*.py")]
    written = codes_in("jobs/values.py", *server, *ledger)
    assert told_codes("code of a request") == written - {"unsupported_parameter"}


def test_the_page_has_all_codes_of_failed_batches() -> None:
    written = codes_in("jobs/line.py", "worker/inspection.py", "worker/intake.py")
    from_values = {"missing_required_parameter", "unknown_parameter", "invalid_type"}
    assert told_codes("code of a batch that failed") == written | from_values


def test_the_page_has_all_codes_of_lines_that_did_not_run() -> None:
    source = (_ROOT / "jobs" / "line.py").read_text()
    written = set(re.findall(r'"(batch_[a-z]+)",\n', source))
    assert told_codes("code of a line that did not run") == written
