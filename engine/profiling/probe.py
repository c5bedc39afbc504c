"""A small job that the engine runs, beside what a machine's figures foresee for it: how much longer
kernels take in a run than in a loop of nothing else.
"""

import contextlib
import dataclasses
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
from engine.foresight import Foresight, foresee
from engine.planning.corrections import (
    ATTENTION,
    BETWEEN,
    COMPUTE,
    EXPANSION,
    OVERHEAD,
    PRODUCTS,
    Correction,
    Corrections,
)
from engine.planning.flops import Work
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

_PRODUCTS: Final = ("gemm_s", "head_s", "expand_s")
_HEAD_SIZE: Final = 64
_BUDGET_BYTES: Final = 2**31


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A job of rows of which `rows_a_sweep` start with each sweep until all have, run `rounds` times: as
    in a block, prompts are computed beside rows that decode.
    """

    layers: int
    hidden: int
    rows: int
    rows_a_sweep: int
    prompt_tokens: int
    output_tokens: int
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One probe with one model: what it is foreseen by, and what the median of its rounds took. On a GPU
    attention is part of what its layers take.
    """

    shape: ModelShape
    work: Work
    policy: Policy
    probe: Probe
    taken_s: float
    attended_s: float
    products_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Seconds that were foreseen, by term, and that the median look took."""

    foreseen: Mapping[str, float]
    taken_s: float
    attended_s: float
    products_s: float

    @property
    def attention_s(self) -> float:
        return self.foreseen["attention_s"]

    @property
    def overhead_s(self) -> float:
        return self.foreseen["overhead_s"]

    @property
    def all_s(self) -> float:
        return sum(self.foreseen.values())


def run_probes(spill_dir: Path, probe: Probe, *, on_gpu: bool) -> tuple[Ran, ...]:
    """Many rows, and few; on a CPU many again with a model that is alike but stored in fewer bits. They
    take turns. The seeded models lie in a folder in `spill_dir` that is gone afterwards.
    """
    few = dataclasses.replace(probe, rows=max(1, probe.rows // _FEWER))
    runs = [(torch.float32, probe), (torch.float32, few)]
    if not on_gpu:
        runs.append((torch.bfloat16, probe))
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=spill_dir, prefix=PREFIX)
        path = Path(stack.enter_context(folder))
        loaded = {
            stored: _load(stack, path / str(stored), probe, stored=stored, on_gpu=on_gpu)
            for stored in dict.fromkeys(stored for stored, _ in runs)
        }
        for engine, _, _ in loaded.values():
            _run(engine, few)
        rounds = [
            [_run(loaded[stored][0], each) for stored, each in runs] for _ in range(probe.rounds)
        ]
    return tuple(
        _ran(*loaded[stored][1:], each, reports)
        for (stored, each), reports in zip(runs, zip(*rounds, strict=True), strict=True)
    )


def factors_of(
    hardware: Hardware, looks: Sequence[Sequence[Ran]], *, on_gpu: bool
) -> Mapping[str, float]:
    """By term, how many times as long the median of the `looks` took as `hardware` foresees."""
    probes = list(zip(*looks, strict=True))
    many, few = (_compared(hardware, its) for its in probes[:2])
    if on_gpu:
        compute, overhead = of_all(many, few)
        factors = {ATTENTION: compute, COMPUTE: compute, OVERHEAD: overhead / compute}
        return MappingProxyType(factors)
    between, overhead = of_rest(many, few)
    factors = {
        ATTENTION: _bounded(many.attended_s / many.attention_s),
        PRODUCTS: _bounded(many.products_s / sum(many.foreseen[name] for name in _PRODUCTS)),
        BETWEEN: between,
        OVERHEAD: overhead / between,
    }
    terms = {term: Correction(factor=factor) for term, factor in factors.items()}
    found = Corrections(measured_on=hardware.measured_on, terms=terms)
    factors[EXPANSION] = turning(found.applied_to(hardware), as_is=probes[0], turned=probes[2])
    return MappingProxyType(factors)


def of_all(many: Compared, few: Compared) -> tuple[float, float]:
    """Factors of what goes with tokens and of what is by the call, where nothing else is told apart."""
    return _two_factors(
        taken_s=(many.taken_s, few.taken_s),
        work_s=(many.all_s - many.overhead_s, few.all_s - few.overhead_s),
        overhead_s=(many.overhead_s, few.overhead_s),
    )


def of_rest(many: Compared, few: Compared) -> tuple[float, float]:
    """The same of what is left beside attention and products."""
    return _two_factors(
        taken_s=(_rest_s(many), _rest_s(few)),
        work_s=(many.foreseen["elementwise_s"], few.foreseen["elementwise_s"]),
        overhead_s=(many.overhead_s, few.overhead_s),
    )


def _rest_s(found: Compared) -> float:
    return found.taken_s - found.attended_s - found.products_s


def _two_factors(
    *,
    taken_s: tuple[float, float],
    work_s: tuple[float, float],
    overhead_s: tuple[float, float],
) -> tuple[float, float]:
    """For which runs of many and of few rows take as long as foreseen; within bounds, the many rows'."""
    determinant = work_s[0] * overhead_s[1] - work_s[1] * overhead_s[0]
    overhead = 1.0
    if determinant > 0:
        overhead = _bounded((work_s[0] * taken_s[1] - work_s[1] * taken_s[0]) / determinant)
    return _bounded((taken_s[0] - overhead * overhead_s[0]) / work_s[0]), overhead


def turning(hardware: Hardware, *, as_is: Sequence[Ran], turned: Sequence[Ran]) -> float:
    """How many times as long turning weights took as foreseen: by what products of weights to be turned
    took longer, in the median look, than those of weights that were not.
    """
    pairs = zip(as_is, turned, strict=True)
    more_s = statistics.median(its.products_s - less.products_s for less, its in pairs)
    before_s, foreseen_s = (
        sum(_compared(hardware, its).foreseen[name] for name in _PRODUCTS)
        for its in (as_is, turned)
    )
    return _bounded(more_s / (foreseen_s - before_s))


def _bounded(factor: float) -> float:
    return min(_MOST, max(_LEAST, factor))


_Loaded = tuple[Engine, Foresight, Policy]


def _load(
    stack: contextlib.ExitStack, folder: Path, probe: Probe, *, stored: torch.dtype, on_gpu: bool
) -> _Loaded:
    source = write_model(folder / "model", _config(probe), stored)
    budgets = Budgets(
        gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
        host_bytes=_BUDGET_BYTES,
        disk_bytes=_BUDGET_BYTES,
        spill_dir=folder / "spill",
    )
    foresight = foresee(source, on_gpu=on_gpu)
    policy = _resident(foresight.shape, probe, on_gpu=on_gpu)
    engine = stack.enter_context(Engine.load(source, budgets=budgets, policy=policy))
    return engine, foresight, policy


def _ran(foresight: Foresight, policy: Policy, probe: Probe, rounds: Sequence[Report]) -> Ran:
    return Ran(
        shape=foresight.shape,
        work=foresight.work,
        policy=policy,
        probe=probe,
        taken_s=statistics.median(report.sweep_s for report in rounds),
        attended_s=statistics.median(map(_attended_s, rounds)),
        products_s=statistics.median(report.products_s for report in rounds),
    )


def _compared(hardware: Hardware, looks: Sequence[Ran]) -> Compared:
    """Of one probe, looked at several times."""
    ran = looks[0]
    model = Model(shape=ran.shape, work=ran.work, hardware=hardware)
    sweeps = [terms.as_dict() for terms in _foreseen(model, ran.policy, ran.probe)]
    return Compared(
        foreseen={name: sum(each[name] for each in sweeps) for name in sweeps[0]},
        taken_s=statistics.median(each.taken_s for each in looks),
        attended_s=statistics.median(each.attended_s for each in looks),
        products_s=statistics.median(each.products_s for each in looks),
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
    while engine.num_rows:
        engine.sweep()
    return engine.report().since(before)


def _foreseen(model: Model, policy: Policy, probe: Probe) -> list[SweepTerms]:
    """Of each sweep: some rows' prompts come with it, those that came before decode."""
    firsts = range(0, probe.rows, probe.rows_a_sweep)
    coming = [min(probe.rows_a_sweep, probe.rows - first) for first in firsts]
    sweep = Sweep(model, policy)
    loads = (
        _load_of(probe, coming, number) for number in range(len(coming) + probe.output_tokens - 1)
    )
    return [sweep.busy(load, kept_tokens=max(1.0, load.live_tokens)) for load in loads]


def _load_of(probe: Probe, coming: Sequence[int], number: int) -> Load:
    """Of the sweep of that number; `coming[i]` rows come with sweep i."""
    prompt = probe.prompt_tokens
    ages = [
        (number - at, rows)
        for at, rows in enumerate(coming)
        if 0 < number - at < probe.output_tokens
    ]
    rows = sum(count for _, count in ages)
    live = sum(count * (prompt + age) for age, count in ages)
    return Load(
        rows=rows,
        prompt_tokens=coming[number] * prompt if number < len(coming) else 0,
        live_tokens=live,
        context_tokens=live / rows if rows else prompt,
        prompt_pairs=(prompt + 1) / 2,
        prompt_length=prompt,
    )


def _resident(shape: ModelShape, probe: Probe, *, on_gpu: bool) -> Policy:
    compute = Tier.GPU if on_gpu else Tier.CPU
    tokens = probe.rows * (probe.prompt_tokens + probe.output_tokens + 32)
    return Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=probe.rows,
        sweep_tokens=probe.rows_a_sweep * probe.prompt_tokens,
        micro_batch_tokens=probe.rows_a_sweep * probe.prompt_tokens + probe.rows,
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
