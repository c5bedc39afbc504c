"""A small job that the engine runs, beside what a machine's figures foresee for it: how much longer
kernels take in a run than in a loop of nothing else.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.foresight import foresee
from engine.planning.corrections import (
    ATTENTION,
    COMPUTE,
    EXPANSION,
    OVERHEAD,
    Correction,
    Corrections,
)
from engine.planning.hardware import Hardware
from engine.planning.load import Load
from engine.planning.policy import Policy, Split, Tier
from engine.planning.prediction import SweepTerms
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape
from engine.planning.sweep import Sweep
from engine.profiling.seeded import PREFIX, write_model
from engine.sweep.report import Report
from engine.timeline import Total, Track

_LEAST: Final = 0.5
_MOST: Final = 3.0
"""A factor outside of these is of something that no factor describes."""

_FEWER: Final = 8
"""Times: few rows beside many."""

_HEAD_SIZE: Final = 64
_BUDGET_BYTES: Final = 2**31


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A job of rows that start and end together, run `rounds` times."""

    layers: int
    hidden: int
    rows: int
    prompt_tokens: int
    output_tokens: int
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Seconds that were foreseen, by term, and that the median round took. On a GPU attention is part of
    what its layers take.
    """

    foreseen: Mapping[str, float]
    taken_s: float
    attended_s: float

    @property
    def attention_s(self) -> float:
        return self.foreseen["attention_s"]

    @property
    def all_s(self) -> float:
        return sum(self.foreseen.values())


def factors_of(
    hardware: Hardware, spill_dir: Path, probe: Probe, *, on_gpu: bool
) -> Mapping[str, float]:
    """By term, how many times as long a run takes as `hardware` foresees: the median round's.

    Few rows beside many tell what is by the call from what is by the FLOP. On a CPU a second model,
    alike but stored in fewer bits, tells what turning its weights takes. A seeded model lies in a
    folder in `spill_dir` that is gone afterwards.
    """
    run = functools.partial(_found, spill_dir=spill_dir, on_gpu=on_gpu)
    few_rows = dataclasses.replace(probe, rows=max(1, probe.rows // _FEWER))
    many, few = run(hardware, (probe, few_rows), stored=torch.float32)
    compute, overhead = work_and_overhead(many, few, on_gpu=on_gpu)
    attention = compute if on_gpu else _bounded(many.attended_s / many.attention_s)
    factors = {ATTENTION: attention, COMPUTE: compute, OVERHEAD: overhead / compute}
    if on_gpu:
        return MappingProxyType(factors)
    terms = {term: Correction(factor=factor) for term, factor in factors.items()}
    corrected = Corrections(measured_on=hardware.measured_on, terms=terms).applied_to(hardware)
    (turned,) = run(corrected, (probe,), stored=torch.bfloat16)
    turning_s = turned.foreseen["expand_s"]
    others_s = turned.all_s - turned.attention_s - turning_s
    factors[EXPANSION] = _bounded((turned.taken_s - turned.attended_s - others_s) / turning_s)
    return MappingProxyType(factors)


def work_and_overhead(many: Compared, few: Compared, *, on_gpu: bool) -> tuple[float, float]:
    """Factors of the two, for which both runs take as long as foreseen; within bounds, the many rows'."""

    def parts(found: Compared) -> tuple[float, float, float]:
        overhead_s = found.foreseen["overhead_s"]
        if on_gpu:
            return found.taken_s, found.all_s - overhead_s, overhead_s
        work_s = found.all_s - found.attention_s - overhead_s
        return found.taken_s - found.attended_s, work_s, overhead_s

    taken_s, work_s, overhead_s = parts(many)
    few_taken_s, few_work_s, few_overhead_s = parts(few)
    determinant = work_s * few_overhead_s - few_work_s * overhead_s
    overhead = 1.0
    if determinant > 0:
        overhead = _bounded((work_s * few_taken_s - few_work_s * taken_s) / determinant)
    return _bounded((taken_s - overhead * overhead_s) / work_s), overhead


def _bounded(factor: float) -> float:
    return min(_MOST, max(_LEAST, factor))


def _found(
    hardware: Hardware,
    probes: Sequence[Probe],
    *,
    spill_dir: Path,
    on_gpu: bool,
    stored: torch.dtype,
) -> list[Compared]:
    """Of each, in turns, by one engine; the first has the most rows."""
    most = probes[0]
    with tempfile.TemporaryDirectory(dir=spill_dir, prefix=PREFIX) as folder:
        source = write_model(Path(folder) / "model", _config(most), stored)
        budgets = Budgets(
            gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
            host_bytes=_BUDGET_BYTES,
            disk_bytes=_BUDGET_BYTES,
            spill_dir=Path(folder) / "spill",
        )
        foresight = foresee(source, on_gpu=on_gpu)
        policy = _resident(foresight.shape, most, on_gpu=on_gpu)
        model = Model(shape=foresight.shape, work=foresight.work, hardware=hardware)
        with Engine.load(source, budgets=budgets, policy=policy) as engine:
            _run(engine, probes[-1])
            rounds = [[_run(engine, each) for each in probes] for _ in range(most.rounds)]
    return [
        _compared(_foreseen(model, policy, each), reports)
        for each, reports in zip(probes, zip(*rounds, strict=True), strict=True)
    ]


def _compared(foreseen: Sequence[SweepTerms], rounds: Sequence[Report]) -> Compared:
    sweeps = [terms.as_dict() for terms in foreseen]
    return Compared(
        foreseen={name: sum(each[name] for each in sweeps) for name in sweeps[0]},
        taken_s=statistics.median(report.sweep_s for report in rounds),
        attended_s=statistics.median(map(_attended_s, rounds)),
    )


def _attended_s(report: Report) -> float:
    return report.totals.get(Track.ATTENTION, Total()).covered_s


def _run(engine: Engine, probe: Probe) -> Report:
    before = engine.report()
    sampling = Sampling(max_tokens=probe.output_tokens, ignore_eos=True)
    for row in range(probe.rows):
        # Of unlike first tokens: nothing is shared.
        prompt = (2 + row, *range(2, 1 + probe.prompt_tokens))
        engine.submit(Prompt(key=str(row), token_ids=prompt, sampling=sampling))
    for _ in range(probe.output_tokens):
        engine.sweep()
    return engine.report().since(before)


def _foreseen(model: Model, policy: Policy, probe: Probe) -> list[SweepTerms]:
    """Of each sweep: the prompts', then those in which every row decodes."""
    rows, prompt = probe.rows, probe.prompt_tokens
    first = Load(
        rows=0,
        prompt_tokens=rows * prompt,
        live_tokens=0,
        context_tokens=prompt,
        prompt_pairs=(prompt + 1) / 2,
        prompt_length=prompt,
    )
    loads = [first]
    for context in range(prompt + 1, prompt + probe.output_tokens):
        live = rows * context
        loads.append(
            dataclasses.replace(
                first, rows=rows, prompt_tokens=0, live_tokens=live, context_tokens=context
            )
        )
    sweep = Sweep(model, policy)
    return [sweep.busy(load, kept_tokens=max(1.0, load.live_tokens)) for load in loads]


def _resident(shape: ModelShape, probe: Probe, *, on_gpu: bool) -> Policy:
    compute = Tier.GPU if on_gpu else Tier.CPU
    tokens = probe.rows * (probe.prompt_tokens + probe.output_tokens + 32)
    return Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=probe.rows,
        sweep_tokens=probe.rows * probe.prompt_tokens,
        micro_batch_tokens=probe.rows * (probe.prompt_tokens + 1),
        kv=Split.on(compute, tokens * shape.kv_bytes_per_token),
        layer_splits=tuple(Split.on(compute, num_bytes) for num_bytes in shape.layer_bytes),
        reason="a run is set beside what is foreseen for it",
    )


def _config(probe: Probe) -> Any:
    heads = probe.hidden // _HEAD_SIZE
    return transformers.LlamaConfig(
        vocab_size=max(512, 4 + probe.rows + probe.prompt_tokens),
        hidden_size=probe.hidden,
        intermediate_size=3 * probe.hidden,
        num_hidden_layers=probe.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
