"""The documents say what is: the map, the task names, the table of settings."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from jobs import queue
from jobs.settings import Settings
from tests.support.bodies_page import page

_ROOT = Path(__file__).parents[1]
_HOUSES = ("server", "worker", "engine", "jobs", "cli")


def _modules() -> set[str]:
    """All modules that hold something: empty package files need no place on a map."""
    return {
        str(path.relative_to(_ROOT))
        for house in _HOUSES
        for path in (_ROOT / house).rglob("*.py")
        if path.stat().st_size > 0
    }


def _map() -> list[str]:
    text = (_ROOT / "ARCHITECTURE.md").read_text()
    blocks = re.findall(r"## Map\n\n```\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 1
    return re.findall(r"^ +(\S+\.py) ", blocks[0], re.MULTILINE)


def test_every_module_is_on_the_map_once_and_nothing_else_is() -> None:
    assert sorted(_map()) == sorted(_modules())


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "README.md", "Makefile"])
def test_every_path_that_a_document_names_is_there(name: str) -> None:
    folders = "|".join([*_HOUSES, "tests", "docker", "docs", "bench", "requirements"])
    path = rf"(?<![\w./-])(?:{folders})/(?:[\w./-]*[\w/])?"
    named = re.findall(path, (_ROOT / name).read_text())
    assert len(named) >= 2
    assert [path for path in named if not (_ROOT / path).exists()] == []


@pytest.mark.parametrize("task", ["VALIDATE_TASK", "FINALIZE_TASK", "SHARD_TASK", "RIDERS_TASK"])
def test_each_task_that_is_rung_is_somebodys_function(task: str) -> None:
    module, _, function = getattr(queue, task).rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_readme_lists_exactly_the_settings() -> None:
    listed = re.findall(r"^\| `(FREIGHT_\w+)` \|", (_ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == [f"FREIGHT_{field.name.upper()}" for field in dataclasses.fields(Settings)]


def test_the_readmes_defaults_are_the_settings_own() -> None:
    rows = dict(
        re.findall(
            r"^\| `(FREIGHT_\w+)` \| `([^`]+)` \|",
            (_ROOT / "README.md").read_text(),
            re.MULTILINE,
        )
    )
    told = Settings.from_environment({**rows, "FREIGHT_STATE_DIR": "somewhere"})
    assert told == Settings(state_dir=Path("somewhere"))


def test_the_page_of_bodies_says_what_the_table_says() -> None:
    assert (_ROOT / "docs" / "api-bodies.md").read_text() == page()


def test_modules_open_by_saying_what_they_own() -> None:
    silent = [name for name in _modules() if not (_ROOT / name).read_text().startswith('"""')]
    assert silent == []
