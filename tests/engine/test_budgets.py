"""Budgets are hard: a model of some hundred megabytes run in processes whose memory is limited."""

import bisect
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.compute.attention import ATTENTION_NAME
from engine.compute.skeleton import build_skeleton
from engine.config import Budgets
from engine.errors import BudgetError
from engine.foresight import foresee
from engine.memory.checkpoint import open_checkpoint
from engine.memory.pack import ensure_pack, plan_groups
from engine.memory.shapes import model_shape
from engine.planning.cost import kv_bytes_within, lookup_bytes, peak_bytes
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape
from tests.support import measured_run
from tests.support.policies import streaming

MIB: Final = 2**20
ROOT: Final = Path(__file__).parents[2]
CGROUP_ROOTS: Final = {
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}


@dataclasses.dataclass(frozen=True)
class Large:
    """A packed checkpoint and what a planner sees of it."""

    folder: Path
    spill_dir: Path
    shape: ModelShape
    weight_bytes: int

    @property
    def table_bytes(self) -> int:
        """Of the embedding, whose rows are read as tokens ask for them."""
        return sum(tensor.num_bytes for tensor in self.shape.embedding_tensors)

    def plan(self, host_bytes: int) -> Policy | None:
        budgets = Budgets(
            gpu_bytes=0, host_bytes=host_bytes, disk_bytes=10**12, spill_dir=self.spill_dir
        )
        with contextlib.suppress(BudgetError):
            return measured_run.plan(self.shape, budgets)
        return None

    def least_bytes(self, *, streamed: bool) -> int:
        """The smallest budget, in MiB, that has a plan; one that streams nothing, unless `streamed`."""

        def is_enough(mib: int) -> bool:
            policy = self.plan(mib * MIB)
            return policy is not None and (streamed or policy.streamed_bytes == 0)

        mib = bisect.bisect_left(range(2048), x=True, key=is_enough)
        assert is_enough(mib)
        assert not is_enough(mib - 1)
        return mib * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=measured_run.VOCAB_SIZE,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    noise = torch.randn(2**20).bfloat16()  # distinct enough: each matrix is cut elsewhere
    state = {
        name: torch.ones(value.shape, dtype=torch.bfloat16)
        if value.ndim == 1
        else 0.05 * noise.repeat(-(-value.numel() // len(noise)))[: value.numel()].view(value.shape)
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder / "model", state_dict=state)
    checkpoint = open_checkpoint(folder / "model")
    skeleton = build_skeleton(checkpoint.config, attention=ATTENTION_NAME)
    shape = model_shape(
        plan_groups(checkpoint, skeleton), skeleton, checkpoint.config, dtype=torch.float32
    )
    pack = ensure_pack(checkpoint, skeleton, spill_dir=folder, disk_bytes=10**12)
    weight_bytes = sum(group.num_bytes for group in pack.groups)
    return Large(folder / "model", folder, shape, weight_bytes)


def make_cgroup(limit_bytes: int) -> Path | None:
    """A new memory cgroup with the limit, where one can be made."""
    for root, limit in CGROUP_ROOTS.items():
        group = root / f"freight-test-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(limit_bytes))
            except OSError:
                group.rmdir()
            else:
                return group
    return None


def run_within(large: Large, host_bytes: int) -> dict[str, Any]:
    """Under a memory cgroup of that size where one can be made; its peak is measured either way."""
    group = make_cgroup(host_bytes)
    command = [sys.executable, "-m", "tests.support.measured_run"]
    arguments = [str(large.folder), str(large.spill_dir), str(host_bytes), str(group or "")]
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        if group is not None:
            group.rmdir()
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def all_resident(large: Large) -> tuple[int, dict[str, Any]]:
    host_bytes = large.least_bytes(streamed=False)
    return host_bytes, run_within(large, host_bytes)


@pytest.fixture(scope="module")
def least(large: Large) -> tuple[int, dict[str, Any]]:
    host_bytes = large.least_bytes(streamed=True)
    return host_bytes, run_within(large, host_bytes)


@pytest.fixture(scope="module")
def half(large: Large) -> tuple[int, dict[str, Any]]:
    """The model is twice the budget."""
    host_bytes = large.weight_bytes // 2
    return host_bytes, run_within(large, host_bytes)


@pytest.mark.parametrize("budget", ["all_resident", "half", "least"])
def test_the_peak_of_a_planned_run_is_within_its_budget(
    budget: str, request: pytest.FixtureRequest
) -> None:
    host_bytes, answer = request.getfixturevalue(budget)
    assert answer["peak_bytes"] <= host_bytes


def test_where_the_weights_lie_changes_no_token(
    all_resident: tuple[int, dict[str, Any]], least: tuple[int, dict[str, Any]]
) -> None:
    assert all_resident[1]["policy_bytes"] == 0 < least[1]["policy_bytes"]
    assert all_resident[1]["tokens"] == least[1]["tokens"]


def test_a_model_twice_its_budget_reads_only_what_is_not_resident(
    large: Large, half: tuple[int, dict[str, Any]]
) -> None:
    _, answer = half
    swept_bytes = answer["num_sweeps"] * answer["policy_bytes"]
    assert 0 < answer["policy_bytes"] < large.weight_bytes - large.table_bytes
    assert answer["streamed_bytes"] == swept_bytes
    # As the kernel counts it; rows of the embedding and what lies ready in two slots come on top.
    ahead_bytes = 2 * (max(large.shape.layer_bytes) + MIB)
    assert answer["read_bytes"] <= swept_bytes + ahead_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_attention_notes_of_cached_tokens_is_what_it_really_takes(
    dtype: str, tmp_path: Path
) -> None:
    heads, kv_heads, size, rows, tokens = 64, 16, 16, 64, 1024
    transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
    ).save_pretrained(tmp_path)
    shape = foresee(tmp_path, on_gpu=False, compute_dtype=dtype).shape
    budgets = Budgets(gpu_bytes=0, host_bytes=0, disk_bytes=0, spill_dir=tmp_path)
    kv_bytes = rows * tokens * shape.kv_bytes_per_token
    policy = streaming(1.0, kv_bytes=kv_bytes, block_rows=rows)(shape, budgets)
    counted_bytes = lookup_bytes(shape, policy)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.measured_attention", dtype]
        + [str(each) for each in (heads, kv_heads, size, rows, tokens)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) <= counted_bytes + 4 * MIB
    assert counted_bytes >= 32 * MIB
    assert int(done.stdout) >= 0.8 * counted_bytes, "no more is counted than there is"
    without = dataclasses.replace(policy, kv=Split.on(Tier.CPU, 0))
    peaks = [peak_bytes(shape, each)[Tier.CPU] for each in (without, policy)]
    assert peaks[1] - peaks[0] == kv_bytes + counted_bytes
    assert kv_bytes_within(shape, Tier.CPU, peaks[1] - peaks[0]) <= kv_bytes
