"""Small jobs that the engine runs, and what a machine's figures foresee for them; compares nothing."""

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.foresight import Foresight, foresee
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

_FEWER: Final = 8
"""Times: few rows beside many."""

_HEAD_SIZE: Final = 64
_NUM_EXPERTS: Final = 4
_NUM_CHOSEN: Final = 2
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
    attention and products are part of what its layers take.
    """

    shape: ModelShape
    work: Work
    policy: Policy
    probe: Probe
    taken_s: float
    attended_s: float
    products_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What took turns: many rows, and few; on a CPU many also with a model that is alike but stored in 16
    bits, so that its weights are `turned`, and with one of experts (`sparse`).
    """

    many: Ran
    few: Ran
    turned: Ran | None = None
    sparse: Ran | None = None


def run_probes(spill_dir: Path, probe: Probe, *, on_gpu: bool) -> Probed:
    """The seeded models lie in a folder in `spill_dir` that is gone afterwards."""
    dense, sparse = _dense(probe), _sparse(probe)
    models = {"dense": (dense, torch.float32)}
    few = dataclasses.replace(probe, rows=max(1, probe.rows // _FEWER))
    runs = {"many": ("dense", probe), "few": ("dense", few)}
    if not on_gpu:
        models |= {"turned": (dense, torch.bfloat16), "sparse": (sparse, torch.float32)}
        runs |= {"turned": ("turned", probe), "sparse": ("sparse", probe)}
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=spill_dir, prefix=PREFIX)
        path = Path(stack.enter_context(folder))
        loaded = {
            name: stack.enter_context(_loaded(path / name, probe, *model, on_gpu=on_gpu))
            for name, model in models.items()
        }
        for each in loaded.values():
            _run(each.engine, few)
        reports: dict[str, list[Report]] = {name: [] for name in runs}
        for _ in range(probe.rounds):
            for name, (model, job) in runs.items():
                reports[name].append(_run(loaded[model].engine, job))
    return Probed(
        **{name: _ran(loaded[model], job, reports[name]) for name, (model, job) in runs.items()}
    )


def foreseen(hardware: Hardware, ran: Ran) -> dict[str, float]:
    """Seconds of the whole job, by term."""
    model = Model(shape=ran.shape, work=ran.work, hardware=hardware)
    sweeps = [terms.as_dict() for terms in _foreseen(model, ran.policy, ran.probe)]
    return {name: sum(each[name] for each in sweeps) for name in sweeps[0]}


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    engine: Engine
    foresight: Foresight
    policy: Policy


@contextlib.contextmanager
def _loaded(
    folder: Path, probe: Probe, config: Any, stored: torch.dtype, *, on_gpu: bool
) -> Iterator[_Loaded]:
    source = write_model(folder / "model", config, stored)
    budgets = Budgets(
        gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
        host_bytes=_BUDGET_BYTES,
        disk_bytes=_BUDGET_BYTES,
        spill_dir=folder / "spill",
    )
    foresight = foresee(source, on_gpu=on_gpu)
    policy = _resident(foresight.shape, probe, on_gpu=on_gpu)
    with Engine.load(source, budgets=budgets, policy=policy) as engine:
        yield _Loaded(engine, foresight, policy)


def _ran(loaded: _Loaded, probe: Probe, rounds: Sequence[Report]) -> Ran:
    return Ran(
        shape=loaded.foresight.shape,
        work=loaded.foresight.work,
        policy=loaded.policy,
        probe=probe,
        taken_s=statistics.median(report.sweep_s for report in rounds),
        attended_s=statistics.median(map(_attended_s, rounds)),
        products_s=statistics.median(report.products_s for report in rounds),
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


def _dense(probe: Probe) -> Any:
    return transformers.LlamaConfig(**_common(probe) | {"intermediate_size": 3 * probe.hidden})


def _sparse(probe: Probe) -> Any:
    return transformers.MixtralConfig(
        **_common(probe),
        intermediate_size=probe.hidden,
        num_local_experts=_NUM_EXPERTS,
        num_experts_per_tok=_NUM_CHOSEN,
        tie_word_embeddings=False,
    )


def _common(probe: Probe) -> dict[str, Any]:
    heads = probe.hidden // _HEAD_SIZE
    return {
        "vocab_size": max(512, 4 + probe.rows + probe.prompt_tokens),
        "hidden_size": probe.hidden,
        "num_hidden_layers": probe.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
