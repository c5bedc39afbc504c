"""Predictions for the machine of the FlexGen paper beside what the paper measured: no GPU is needed.

    python -m bench.paper_machine

Prints the tables of docs/planner.md.
"""

import dataclasses
from pathlib import Path

from bench.paper_models import OPT_6_7B, OPT_30B, OPT_175B, Opt
from engine.config import Budgets
from engine.planning.hardware import Hardware
from engine.planning.machines import T4_208GB, T4_208GB_AS_FLEXGEN
from engine.planning.plan import make_plan
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy, Split, Tier
from engine.planning.predict import predict
from engine.planning.prediction import Prediction
from engine.planning.roofline import Model
from engine.planning.shape import leading_border_bytes, total_bytes
from engine.planning.workload import Workload

_NOWHERE = Path("nowhere")
_GENERATED = 32
_LONG_JOB_ROWS = 5000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A policy of the paper: percents of weights, KV and hidden states on GPU and CPU; tokens/s."""

    opt: Opt
    prompt: int
    gpu_batch: int
    num_gpu_batches: int
    percents: tuple[int, int, int, int, int, int]
    tokens_per_s: float

    @property
    def rows(self) -> int:
        return self.gpu_batch * self.num_gpu_batches

    @property
    def policy(self) -> Policy:
        """Its block as ours: all prompts in the first sweep, weights cut at the percents."""
        shape = self.opt.shape
        weights_gpu, weights_cpu, kv_gpu, kv_cpu, hidden_gpu, _ = self.percents
        kv_bytes = self.rows * (self.prompt + _GENERATED) * shape.kv_bytes_per_token

        def split(num_bytes: int, near: int, hosted: int) -> Split:
            return Split(gpu_bytes=near, cpu_bytes=hosted - near, disk_bytes=num_bytes - hosted)

        tensors, total = shape.layers[0], total_bytes(shape.layers[0])
        near = leading_border_bytes(tensors, weights_gpu * total // 100)
        hosted = leading_border_bytes(tensors, (weights_gpu + weights_cpu) * total // 100)
        on_gpu, on_cpu = kv_bytes * kv_gpu // 100, kv_bytes * (kv_gpu + kv_cpu) // 100
        return Policy(
            compute=Tier.GPU,
            compute_dtype="float16",
            block_rows=self.rows,
            sweep_tokens=self.rows * self.prompt,
            micro_batch_tokens=self.gpu_batch * self.prompt,
            kv=split(kv_bytes, on_gpu, on_cpu),
            layer_splits=(split(total, near, hosted),) * shape.num_layers,
            hidden_tier=None if hidden_gpu else Tier.CPU,
            reason="published",
        )


_30B, _175B = (20, 80, 0, 100, 0, 100), (0, 50, 0, 0, 0, 100)
_ALL_GPU = (100, 0, 100, 0, 100, 0)
PUBLISHED = tuple(
    Published(
        opt=opt,
        prompt=prompt,
        gpu_batch=gpu_batch,
        num_gpu_batches=count,
        percents=percents,
        tokens_per_s=rate,
    )
    for opt, prompt, gpu_batch, count, percents, rate in (
        (OPT_6_7B, 256, 4, 1, _ALL_GPU, 53.29),
        (OPT_6_7B, 512, 2, 1, _ALL_GPU, 25.26),
        (OPT_6_7B, 1024, 1, 1, _ALL_GPU, 13.72),
        (OPT_30B, 256, 160, 2, (10, 90, 0, 100, 0, 100), 16.01),
        (OPT_30B, 512, 48, 3, _30B, 7.32),
        (OPT_30B, 1024, 20, 4, (4, 96, 0, 100, 0, 100), 3.50),
        (OPT_175B, 256, 64, 8, _175B, 1.36),
        (OPT_175B, 512, 32, 8, _175B, 0.69),
        (OPT_175B, 1024, 12, 12, _175B, 0.35),
    )
)


def predicted(case: Published, hardware: Hardware) -> Prediction:
    """Of one block under the published policy, in our schedule."""
    model = Model(shape=case.opt.shape, work=case.opt.work, hardware=hardware)
    workload = Workload.uniform(case.prompt, _GENERATED, num_rows=case.rows)
    return predict(model, case.policy, workload)


def print_published() -> None:
    print("| model | prompt | rows | published | at its rates | at the links' rates |")
    print("|---|---|---|---|---|---|")
    for case in PUBLISHED:
        theirs = predicted(case, T4_208GB_AS_FLEXGEN).job_tokens_per_s
        links = predicted(case, T4_208GB).job_tokens_per_s
        print(
            f"| {case.opt.name} | {case.prompt} | {case.rows} | {case.tokens_per_s:.2f} "
            f"| {theirs:.2f} ({theirs / case.tokens_per_s - 1:+.0%}) | {links:.2f} |"
        )


def print_ours() -> None:
    print("| model | prompt | published | our policy | tokens/s | binds |")
    print("|---|---|---|---|---|---|")
    for case in PUBLISHED:
        for hardware in (T4_208GB_AS_FLEXGEN, T4_208GB):
            plan = make_plan(case.opt.shape, _budgets(hardware), _wishes(case, hardware))
            policy, found = plan.policy, plan.prediction
            total = sum(case.opt.shape.layer_bytes)
            near = sum(split.gpu_bytes for split in policy.layer_splits) / total
            far = sum(split.disk_bytes for split in policy.layer_splits) / total
            where = " ".join(
                f"{tier} {policy.kv[tier] / policy.kv.total_bytes:.0%}"
                for tier in Tier
                if policy.kv[tier]
            )
            rates = "its rates" if hardware is T4_208GB_AS_FLEXGEN else "links' rates"
            print(
                f"| {case.opt.name} | {case.prompt} | {case.tokens_per_s:.2f} | {rates}: "
                f"{policy.block_rows} rows; weights GPU {near:.0%}, disk {far:.0%}; KV {where} "
                f"| {found.job_tokens_per_s:.2f} | {found.binding_lane} |"
            )


def _budgets(hardware: Hardware) -> Budgets:
    return Budgets(
        gpu_bytes=hardware.gpu_bytes,
        host_bytes=hardware.host_bytes,
        disk_bytes=hardware.disk_bytes,
        spill_dir=_NOWHERE,
    )


def _wishes(case: Published, hardware: Hardware) -> Wishes:
    workload = Workload.uniform(case.prompt, _GENERATED, num_rows=_LONG_JOB_ROWS)
    situation = Situation(hardware=hardware, work=case.opt.work, workload=workload)
    return Wishes(situation=situation)


if __name__ == "__main__":
    print_published()
    print()
    print_ours()
