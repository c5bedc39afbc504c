"""`freight plan`: from a config alone to a policy, tables, a file that is obeyed, and a frontier."""

import json
import re
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from cli.errors import StartError
from cli.file_workload import waiting_of_file
from cli.main import app
from cli.planned import Question
from engine.config import Budgets
from engine.errors import BudgetError, HardwareError
from engine.foresight import foresee
from engine.planning.cost import check_budgets, peak_bytes, with_spare_kv
from engine.planning.frontier import frontier
from engine.planning.machines import T4_208GB
from engine.planning.others import known_policies
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy, Tier
from engine.planning.records import read_record
from engine.planning.workload import Workload
from jobs.settings import Settings
from tests.support.fake_engine import FakeTokenizer
from tests.support.profiles import hardware_here
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer
from worker.render import Renderer

CONFIG: Final = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setenv("FREIGHT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "100")
    told = CliRunner().invoke(app, ["plan", *options], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    return str(told.output)


def test_a_config_alone_is_planned_for_a_machine_known_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "policy.json"
    small = ["--gpu-memory", "2GB", "--host-memory", "40GB"]
    text = _plan(
        tmp_path, monkeypatch, str(source), "--hardware", "t4-208gb", *small, "--json", str(out)
    )
    policy = read_record(Policy, out)
    shape = foresee(source, on_gpu=True).shape
    assert [split.total_bytes for split in policy.layer_splits] == list(shape.layer_bytes)
    assert policy.streamed_bytes > 0
    assert f"block                  {policy.block_rows} rows" in text
    assert "tokens/s in steady state" in text
    assert re.search(r"layers +G+C+", text)
    assert "binds" in text
    assert re.search(r"products +10% faster +\+", text)


def test_this_machines_profile_and_a_files_lines_are_what_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_tokenizer(write_tiny_model(tmp_path / "model", "llama"))
    profile = tmp_path / "profile.json"
    profile.write_text(hardware_here(tmp_path).to_json())
    monkeypatch.setenv("FREIGHT_PROFILE", str(profile))
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(_line(index, "x" * (20 + index)) for index in range(9)))
    page = tmp_path / "frontier.html"
    text = _plan(
        tmp_path,
        monkeypatch,
        str(source),
        *("--workload", str(requests), "--frontier", str(page), "--disk-space", "1GB"),
    )
    assert "9 rows of 24 prompt tokens" in text
    drawn = page.read_text()
    assert "<polyline" in drawn
    assert "all in memory" in drawn
    assert "chosen" in drawn


def _line(index: int, prompt: str, **body: object) -> str:
    asked = {"model": "m", "prompt": prompt, "max_tokens": 8, **body}
    line = {"custom_id": f"{index}", "method": "POST", "url": "/v1/completions", "body": asked}
    return json.dumps(line) + "\n"


def test_a_file_is_summed_up_as_intake_would(tmp_path: Path) -> None:
    renderer = Renderer(tokenizer=FakeTokenizer(), max_context_tokens=100)
    path = tmp_path / "requests.jsonl"
    lines = [_line(0, "say: dog"), _line(1, "y" * 200), _line(2, "say: cat"), _line(3, "say: cats")]
    path.write_text("".join(lines))
    found = waiting_of_file(path, Settings(state_dir=tmp_path), renderer)
    assert found.num_open == 4
    assert sum(group.num_lines for group in found.groups) == 3
    assert sum(group.prompt_tokens for group in found.groups) == 8 + 8 + 9
    assert sum(group.shared_tokens for group in found.groups) == 5 + 8
    path.write_text(_line(0, "y" * 200))
    with pytest.raises(StartError, match="none of its lines"):
        waiting_of_file(path, Settings(state_dir=tmp_path), renderer)


def test_machines_that_are_not_there_are_refused(source: Path, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, model=str(source))
    with pytest.raises(StartError, match="known are t4-208gb"):
        Question.of(settings, workload=None, hardware="t5")
    profile = tmp_path / "profile.json"
    profile.write_text(hardware_here(tmp_path).to_json())
    asking = Settings(state_dir=tmp_path, model=str(source), gpu_memory_bytes=10**9)
    with pytest.raises(HardwareError, match="has no GPU"):
        Question.of(asking, workload=None, hardware=str(profile))


WORKLOAD: Final = Workload.uniform(512, 64, num_rows=300)


def _budgets(*, gpu_bytes: int, host_bytes: int) -> Budgets:
    return Budgets(
        gpu_bytes=gpu_bytes, host_bytes=host_bytes, disk_bytes=10**12, spill_dir=Path("spill")
    )


def test_other_systems_policies_fit_and_are_those_they_are_known_for(source: Path) -> None:
    shape = foresee(source, on_gpu=True).shape
    tight = _budgets(gpu_bytes=28 * 10**8, host_bytes=10**11)
    known = {each.label: each.policy for each in known_policies(shape, tight, WORKLOAD)}
    assert not any("all in" in label for label in known)
    assert len([label for label in known if "FlexGen" in label]) == 2
    for policy in known.values():
        check_budgets(shape, policy, tight)
    flexgen = known["FlexGen's policy for OPT-30B"]
    assert flexgen.block_rows == 48 * 3
    assert flexgen.kv[Tier.GPU] == 0
    (accelerate,) = (policy for label, policy in known.items() if "Accelerate" in label)
    assert not accelerate.overlap
    assert {split[Tier.GPU] > 0 and split[Tier.CPU] > 0 for split in accelerate.layer_splits} == {
        False
    }
    roomy = known_policies(shape, _budgets(gpu_bytes=10**11, host_bytes=10**11), WORKLOAD)
    assert roomy[0].label == "all in GPU memory"
    assert roomy[0].policy.streamed_bytes == 0


def test_the_frontier_rises_in_both_and_ends_where_no_more_rows_fit(source: Path) -> None:
    seen = foresee(source, on_gpu=True)
    situation = Situation(hardware=T4_208GB, work=seen.work, workload=WORKLOAD)
    budgets = _budgets(gpu_bytes=2 * 10**9, host_bytes=3 * 10**10)
    plans = frontier(seen.shape, budgets, Wishes(situation=situation))
    assert len(plans) > 2
    found = [(plan.prediction.latency_s, plan.prediction.tokens_per_s) for plan in plans]
    assert found == sorted(found)
    assert [rate for _, rate in found] == sorted(rate for _, rate in found)
    none = _budgets(gpu_bytes=10**7, host_bytes=10**7)
    assert frontier(seen.shape, none, Wishes(situation=situation)) == []


def test_spare_memory_goes_to_keys_and_values_and_no_budget_is_passed(source: Path) -> None:
    shape = foresee(source, on_gpu=False).shape
    budgets = _budgets(gpu_bytes=0, host_bytes=2 * 10**10)
    (known, *_) = known_policies(shape, budgets, Workload.uniform(16, 16, num_rows=4))
    wider = with_spare_kv(shape, known.policy, budgets)
    assert wider.kv[Tier.CPU] > known.policy.kv[Tier.CPU]
    check_budgets(shape, wider, budgets)
    assert peak_bytes(shape, wider)[Tier.CPU] <= budgets.host_bytes
    exact = _budgets(gpu_bytes=0, host_bytes=peak_bytes(shape, known.policy)[Tier.CPU])
    assert with_spare_kv(shape, known.policy, exact) == known.policy
    with pytest.raises(BudgetError):
        check_budgets(shape, wider, exact)
