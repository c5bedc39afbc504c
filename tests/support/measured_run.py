"""One run of the engine in a process of its own, under a memory limit, that says what it took.

`python -m tests.support.measured_run FOLDER SPILL_DIR HOST_BYTES CGROUP` prints one JSON object;
CGROUP is a memory cgroup to enter once everything is imported, or empty.
"""

import json
import os
import sys
from pathlib import Path
from typing import Final

import torch
from transformers.models.llama import modeling_llama

from engine.config import Budgets, Prompt, Sampling, Scoring
from engine.engine import Engine
from engine.memory.pack import ensure_pack  # noqa: F401  # imported before memory is counted
from engine.planning.planners.base import Wishes
from engine.planning.planners.fixed import plan_fixed
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.timeline import Track

VOCAB_SIZE: Final = 16_000
WISHES: Final = Wishes(block_rows=8, sweep_tokens=128)
assert modeling_llama.LlamaForCausalLM is not None  # the library imports it late, by itself


def plan(shape: ModelShape, budgets: Budgets) -> Policy:
    return plan_fixed(shape, budgets, WISHES)


def prompts(vocab_size: int) -> list[Prompt]:
    """Every other one is scored as well: that too has to fit."""
    return [
        Prompt(
            key=str(index),
            token_ids=tuple((7 * index + 13 * place) % vocab_size for place in range(8 + index)),
            sampling=Sampling(max_tokens=2, ignore_eos=True),
            reading=Scoring(num_top=20) if index % 2 else None,
        )
        for index in range(8)
    ]


def memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def read_from_disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def main() -> None:
    folder, spill_dir, host_bytes, cgroup = sys.argv[1:]
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # wakes the libraries: part of the baseline
    if cgroup:
        # What was charged before stays with the group that this process comes from.
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    baseline_bytes = memory_bytes("VmRSS")
    budgets = Budgets(
        gpu_bytes=0, host_bytes=int(host_bytes), disk_bytes=10**12, spill_dir=Path(spill_dir)
    )
    with Engine.load(Path(folder), budgets=budgets, policy=plan) as engine:
        loaded_bytes = memory_bytes("VmHWM") - baseline_bytes
        read_before = read_from_disk_bytes()
        found = {done.key: done.token_ids for done in engine.generate(prompts(VOCAB_SIZE))}
        report = engine.report()
        policy = engine.policy
    answer = {
        "peak_bytes": memory_bytes("VmHWM") - baseline_bytes,
        "loaded_bytes": loaded_bytes,
        "read_bytes": read_from_disk_bytes() - read_before,
        "timeline_bytes": report.totals[Track.DISK_READ].num_bytes,
        "policy_bytes": policy.streamed_bytes,
        "streamed_bytes": report.weights_streamed_bytes,
        "num_sweeps": report.num_sweeps,
        "reason": f"{policy.reason}; {report.gemm_reason}",
        "tokens": found,
    }
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
