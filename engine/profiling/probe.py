"""A small job that the engine runs, beside what a machine's figures foresee for it: how much longer
kernels take in a run than in a loop of nothing else.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
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
class _Found:
    """What was foreseen of each sweep, and what each round reports of all of them."""

    foreseen: list[SweepTerms]
    rounds: list[Report]

    def foreseen_s(self, *names: str) -> float:
        return sum(terms.as_dict()[name] for terms in self.foreseen for name in names)

    @property
    def all_s(self) -> float:
        return sum(sum(terms.as_dict().values()) for terms in self.foreseen)

    def median(self, value: Callable[[Report], float]) -> float:
        """Within bounds."""
        return min(_MOST, max(_LEAST, statistics.median(map(value, self.rounds))))


def factors_of(
    hardware: Hardware, spill_dir: Path, probe: Probe, *, on_gpu: bool
) -> Mapping[str, float]:
    """By term, how many times as long a run takes as `hardware` foresees: the median round's.

    On a CPU a second model, alike but stored in fewer bits, tells what turning its weights takes. A
    seeded model lies in a folder in `spill_dir` that is gone afterwards.
    """
    run = functools.partial(_found, spill_dir=spill_dir, probe=probe, on_gpu=on_gpu)
    ready = run(hardware, stored=torch.float32)
    if on_gpu:
        # Attention is part of what its layers take.
        factor = ready.median(lambda report: report.sweep_s / ready.all_s)
        return MappingProxyType({ATTENTION: factor, COMPUTE: factor})
    attention_s = ready.foreseen_s("attention_s")
    others_s = ready.all_s - attention_s
    factors = {
        ATTENTION: ready.median(lambda report: _attended_s(report) / attention_s),
        COMPUTE: ready.median(lambda report: (report.sweep_s - _attended_s(report)) / others_s),
    }
    terms = {term: Correction(factor=factor) for term, factor in factors.items()}
    corrected = Corrections(measured_on=hardware.measured_on, terms=terms).applied_to(hardware)
    turned = run(corrected, stored=torch.bfloat16)
    turning_s = turned.foreseen_s("expand_s")
    others_s = turned.all_s - turned.foreseen_s("attention_s", "expand_s")
    factors[EXPANSION] = turned.median(
        lambda report: (report.sweep_s - _attended_s(report) - others_s) / turning_s
    )
    return MappingProxyType(factors)


def _found(
    hardware: Hardware, *, spill_dir: Path, probe: Probe, on_gpu: bool, stored: torch.dtype
) -> _Found:
    with tempfile.TemporaryDirectory(dir=spill_dir, prefix=PREFIX) as folder:
        source = write_model(Path(folder) / "model", _config(probe), stored)
        budgets = Budgets(
            gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
            host_bytes=_BUDGET_BYTES,
            disk_bytes=_BUDGET_BYTES,
            spill_dir=Path(folder) / "spill",
        )
        foresight = foresee(source, on_gpu=on_gpu)
        policy = _resident(foresight.shape, probe, on_gpu=on_gpu)
        model = Model(shape=foresight.shape, work=foresight.work, hardware=hardware)
        foreseen = _foreseen(model, policy, probe)
        with Engine.load(source, budgets=budgets, policy=policy) as engine:
            _run(engine, dataclasses.replace(probe, rows=1))
            rounds = [_run(engine, probe) for _ in range(probe.rounds)]
    return _Found(foreseen=foreseen, rounds=rounds)


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
