"""Policies and other values of the planner as JSON: the same again, or a refusal that names a field."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import pytest

from engine.errors import RecordError
from engine.planning.policy import Policy, Split, Tier
from engine.planning.records import read_record, to_json, write_record

POLICY: Final = Policy(
    compute=Tier.GPU,
    compute_dtype="bfloat16",
    block_rows=96,
    sweep_tokens=512,
    micro_batch_tokens=256,
    kv=Split(gpu_bytes=10, cpu_bytes=20, disk_bytes=0),
    layer_splits=(Split.on(Tier.CPU, 7), Split(gpu_bytes=1, cpu_bytes=2, disk_bytes=3)),
    head_split=Split.on(Tier.DISK, 9),
    hidden_tier=Tier.CPU,
    attends_beside=False,
    reason="a test",
)


def test_a_policy_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    for policy in (POLICY, dataclasses.replace(POLICY, head_split=None, hidden_tier=None)):
        write_record(tmp_path / "deep" / "policy.json", policy)
        assert read_record(Policy, tmp_path / "deep" / "policy.json") == policy
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["policy.json"]


def test_what_has_a_default_may_be_left_out(tmp_path: Path) -> None:
    fields = to_json(POLICY)
    del fields["num_slots"]
    (tmp_path / "policy.json").write_text(json.dumps(fields))
    assert read_record(Policy, tmp_path / "policy.json") == POLICY


BAD: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a text for a number": ({"block_rows": "9"}, 'Policy.block_rows is a whole number, not "9"'),
    "true for a number": ({"block_rows": True}, "Policy.block_rows is a whole number, not true"),
    "a number for a choice": ({"overlap": 1}, "Policy.overlap is true or false, not 1"),
    "no such tier": ({"compute": "tpu"}, 'Policy.compute is one of gpu, cpu, disk, not "tpu"'),
    "an unknown field": ({"rows": 1}, "Policy has no field 'rows'"),
    "deep in a list": (
        {"layer_splits": [{"gpu_bytes": 1, "cpu_bytes": None, "disk_bytes": 3}]},
        r"Policy.layer_splits\[0\].cpu_bytes is a whole number, not null",
    ),
    "no list": ({"layer_splits": 3}, "Policy.layer_splits is a list, not 3"),
    "no object": ({"kv": []}, r"Policy.kv is an object, not \[\]"),
    "half an object": ({"kv": {"gpu_bytes": 1}}, "Policy.kv lacks cpu_bytes, disk_bytes"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_wrong_field_is_refused_by_its_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(to_json(POLICY) | changes))
    with pytest.raises(RecordError, match=message) as refusal:
        read_record(Policy, path)
    assert str(path) in str(refusal.value)


def test_files_that_hold_nothing_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"gone\.json cannot be read"):
        read_record(Policy, tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"compute": ')
    with pytest.raises(RecordError, match=r"half\.json is not JSON"):
        read_record(Policy, tmp_path / "half.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        write_record(tmp_path / "file" / "policy.json", POLICY)
