"""Model types: those the engine takes run exactly, the others are refused by name.

A sample runs here; `make coverage-models` runs every type of the library.
"""

import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.engine import Engine
from engine.errors import UnsupportedModelError
from engine.memory.architecture import REFUSED_TYPES, reason_to_refuse, require_supported
from engine.memory.shapes import kv_shapes
from tests.support.model_check import TOLERANCE, largest_error, write_model
from tests.support.models_page import page, verdicts
from tests.support.shrunk_models import VARIANTS, causal_types, shrink

_PAGE: Final = Path(__file__).parents[2] / "docs" / "models.md"

# Each brings something of its own: see the page.
_SAMPLE: Final = (
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt2",
    "gpt_oss",
    "granite",
    "jetmoe",
    "llama",
    "llama4_text",
    "longcat_flash",
    "mimo_v2_flash",
    "modernbert-decoder",
    "olmoe",
    "opt",
    "phi3",
    "qwen3",
    "qwen3_moe",
)

# The library warns of what is small or random about these models, in each type's own way.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> None:
    torch.set_num_threads(1)  # tensors this small only wait for one another
    transformers.logging.disable_progress_bar()


def _check(config: Any, folder: Path) -> None:
    require_supported(config)
    source = write_model(config, folder / "model")
    assert largest_error(source, folder) < TOLERANCE


@pytest.mark.parametrize("name", _SAMPLE)
def test_a_type_that_is_taken_runs_exactly(name: str, tmp_path: Path) -> None:
    _check(shrink(causal_types()[name]), tmp_path)


@pytest.mark.parametrize("name", ["gpt2 scaled by layer", "llama4_text with tempered queries"])
def test_what_a_config_may_ask_for_beside_the_default_runs_exactly(
    name: str, tmp_path: Path
) -> None:
    model_type, changes = VARIANTS[name]
    _check(shrink(causal_types()[model_type], **changes), tmp_path)


@pytest.mark.models
@pytest.mark.parametrize("name", sorted(set(causal_types()) - set(_SAMPLE)))
def test_every_type_runs_exactly_or_is_refused(name: str, tmp_path: Path) -> None:
    if name in REFUSED_TYPES:
        pytest.skip(REFUSED_TYPES[name])
    config = shrink(causal_types()[name])
    if (reason := reason_to_refuse(config)) is not None:
        pytest.skip(reason)
    _check(config, tmp_path)


@pytest.mark.models
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_runs_exactly(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    _check(shrink(causal_types()[model_type], **changes), tmp_path)


def _kv(name: str) -> list[tuple[int, int, int]]:
    shapes = kv_shapes(shrink(causal_types()[name]))
    return [(shape.num_heads, shape.key_size, shape.value_size) for shape in shapes]


def test_keys_and_values_may_differ_by_layer_and_from_what_the_config_calls_them() -> None:
    assert _kv("llama") == [(2, 16, 16)] * 4
    assert _kv("deepseek_v3") == [(4, 24, 12)] * 4
    assert _kv("gemma4_unified_text") == [(2, 16, 16), (1, 32, 32)] * 2
    assert _kv("mimo_v2_flash") == [(2, 16, 12), (4, 16, 12)] * 2
    assert _kv("jetmoe") == [(4, 16, 16)] * 4
    assert len(_kv("longcat_flash")) == 4  # two attentions in each of two layers


@pytest.mark.parametrize("name", ["doge", "gpt_bigcode"])
def test_the_check_finds_a_model_that_runs_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no rule refuses is found out: by the engine in the first sweep, or by the comparison."""
    monkeypatch.setattr("engine.memory.checkpoint.require_supported", lambda config: None)
    source = write_model(shrink(causal_types()[name]), tmp_path / "model")
    if name == "doge":
        with pytest.raises(UnsupportedModelError, match="DogeAttention attends with a mask"):
            largest_error(source, tmp_path)
        return
    monkeypatch.setattr("engine.compute.attention._window", lambda module, given: 5)
    with pytest.raises(AssertionError, match="tokens differ"):
        largest_error(source, tmp_path)


def test_a_refused_type_is_refused_when_its_checkpoint_is_loaded(tmp_path: Path) -> None:
    source = write_model(shrink(causal_types()["lfm2"]), tmp_path / "model")
    budgets: Any = None  # never looked at
    with pytest.raises(UnsupportedModelError, match=r"'lfm2'.*kind conv"):
        Engine.load(source, budgets=budgets, policy=budgets)


def test_the_page_says_of_each_type_what_the_engine_does() -> None:
    text = _PAGE.read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (exact|refused) \| (.*) \|$", text, re.MULTILINE)
    listed = {name: (verdict, note) for name, verdict, note in rows}
    if f"transformers {transformers.__version__} " in text:
        assert text == page(tolerance=TOLERANCE), "run `make docs-models`"
    else:  # another version's page: what both know
        found = verdicts()
        both = listed.keys() & found.keys()
        assert {name: listed[name] for name in both} == {name: found[name] for name in both}
