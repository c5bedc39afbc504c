"""What a sweep costs beside bytes and FLOPs: models too small to have any, run by the engine itself."""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.planning.policy import Policy, Split, Tier
from engine.planning.routing import expected_experts
from engine.planning.shape import ModelShape, leading_border_bytes
from engine.profiling.seeded import PREFIX, write_model

_VOCAB_SIZE: Final = 128
_HIDDEN_SIZE: Final = 32
_HEADS: Final = 8
_LAYERS: Final = (2, 10)
_ROWS: Final = (1, 32)
"""Few and many of each."""
_PROMPT_TOKENS: Final = 4
_NUM_EXPERTS: Final = 16
_NUM_CHOSEN: Final = 2
_BUDGET_BYTES: Final = 2**30
_KV_BYTES: Final = 2**24
_LEAST_SWEEPS: Final = 4
_NUM_TURNS: Final = 3

_UNIT_HIDDEN_SIZE: Final = 512
_UNIT_LAYERS: Final = 4
_UNIT_BYTES: Final = 2**18
"""What streams of a layer: little to read, in a layer that keeps the cores busy."""
_UNIT_TOKENS: Final = 200
"""Of each row: as many as there is room for, so that none is preempted."""

_Way = Callable[[float], list[float]]
"""Seconds of sweeps of one kind, run for so long."""

_Place = Callable[[ModelShape, Budgets], Policy]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Of a CPU's rate, what is `lost_beside_...` weights' reads and keys' and values' fetches. Seconds: of a sweep whatever it carries, of each step, of each row, of each row in each step; of
    each prompt in each step, and of each expert in it that has tokens; of each unit that streams, and
    of each product that is no tiny one.
    """

    sweep_s: float
    step_s: float
    row_s: float
    row_step_s: float
    prompt_step_s: float = 0.0
    expert_s: float = 0.0
    unit_s: float = 0.0
    product_s: float = 0.0
    lost_beside_reads: float = 0.0
    lost_beside_fetches: float = 0.0


def measure_overheads(spill_dir: Path, *, on_gpu: bool, seconds: float) -> Overheads:
    """By sweeps of few and of many layers, each with one row and with many, with many prompts, and of
    few layers with experts; a unit's by sweeps of layers that stream a little of each, beside such as
    do not. None is below 0.

    The seeded models and their packs lie in a folder in `spill_dir` that is gone afterwards.
    """
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=spill_dir, prefix=PREFIX)
        path = Path(stack.enter_context(folder))
        ways = _ways(stack, path, on_gpu=on_gpu)
        taken_s: list[list[float]] = [[] for _ in ways]
        # They take turns, so that others' load meets them alike.
        for _ in range(_NUM_TURNS):
            for way, taken in zip(ways, taken_s, strict=True):
                taken.extend(way(seconds / (len(ways) + 1) / _NUM_TURNS))
        unit_s = _unit_s(stack, path / "units", on_gpu=on_gpu, seconds=seconds / (len(ways) + 1))
    # What other processes took is in the slower ones.
    *decoding, few, many, experts_s = (
        statistics.quantiles(taken, n=4, method="inclusive")[0] for taken in taken_s
    )
    found = fit_overheads(decoding, layers=_LAYERS, rows=_ROWS)
    met = expected_experts(_NUM_EXPERTS, _NUM_CHOSEN, _ROWS[1])
    return dataclasses.replace(
        found,
        prompt_step_s=fit_prompts((few, many), found, layers=_LAYERS, num_prompts=_ROWS[1]),
        expert_s=max(0.0, experts_s - decoding[1]) / (_LAYERS[0] * met),
        unit_s=unit_s,
    )


def _ways(stack: contextlib.ExitStack, folder: Path, *, on_gpu: bool) -> list[_Way]:
    """Of (few layers, few rows), (few, many), (many, few) and (many, many); of prompts in few layers
    and in many; of many rows in few layers with experts.
    """

    def engine(name: str, config: Any) -> Engine:
        source = write_model(folder / name / "model", config)
        return stack.enter_context(_engine(source, _everything_resident, on_gpu=on_gpu))

    dense = [engine(f"layers-{count}", _dense(count)) for count in _LAYERS]
    sparse = engine("experts", _with_experts(_LAYERS[0]))
    return [
        *(functools.partial(_sweeps_s, its, count) for its in dense for count in _ROWS),
        *(functools.partial(_prompt_sweeps_s, its) for its in dense),
        functools.partial(_sweeps_s, sparse, _ROWS[1]),
    ]


def fit_overheads(
    taken_s: Sequence[float], *, layers: tuple[int, int], rows: tuple[int, int]
) -> Overheads:
    """From the seconds of sweeps of (few layers, few rows), (few, many), (many, few), (many, many).

    t = sweep + layers * step + rows * row + layers * rows * row_step: four of each, solved exactly.
    """
    few_few, few_many, many_few, many_many = taken_s
    more_layers, more_rows = layers[1] - layers[0], rows[1] - rows[0]
    of_rows = ((few_many - few_few) / more_rows, (many_many - many_few) / more_rows)
    row_step_s = max(0.0, (of_rows[1] - of_rows[0]) / more_layers)
    row_s = max(0.0, of_rows[0] - layers[0] * row_step_s)
    of_layers = (many_few - few_few) / more_layers
    step_s = max(0.0, of_layers - rows[0] * row_step_s)
    rest_s = few_few - layers[0] * step_s - rows[0] * (row_s + layers[0] * row_step_s)
    return Overheads(sweep_s=max(0.0, rest_s), step_s=step_s, row_s=row_s, row_step_s=row_step_s)


def fit_prompts(
    taken_s: tuple[float, float],
    found: Overheads,
    *,
    layers: tuple[int, int],
    num_prompts: int,
) -> float:
    """From the seconds of sweeps of prompts alone with few and with many layers: a prompt's in a step,
    beside the step's own. Prompts sample too, which is a row's and no layer's.
    """
    of_layers = (taken_s[1] - taken_s[0]) / (layers[1] - layers[0])
    return max(0.0, of_layers - found.step_s) / num_prompts


def _unit_s(stack: contextlib.ExitStack, folder: Path, *, on_gpu: bool, seconds: float) -> float:
    """What a sweep takes longer for each layer of which a little streams, waiting left out. Of two
    engines that sweep in turns: what others' load adds, it adds to both.
    """
    shape = {
        "hidden_size": _UNIT_HIDDEN_SIZE,
        "intermediate_size": 4 * _UNIT_HIDDEN_SIZE,
        "num_key_value_heads": 1,
    }
    source = write_model(folder, transformers.LlamaConfig(**_common(_UNIT_LAYERS) | shape))
    whole, streamed = (
        stack.enter_context(_engine(source, place, on_gpu=on_gpu))
        for place in (_everything_resident, _little_streamed)
    )
    prompts = _prompts(_ROWS[1], max_tokens=_UNIT_TOKENS)
    more_s: list[float] = []
    with _carrying(whole, prompts), _carrying(streamed, prompts):
        ends_s = time.perf_counter() + seconds
        while len(more_s) < _LEAST_SWEEPS or time.perf_counter() < ends_s:
            whole_s = _swept_s(whole)
            streamed_s = _swept_s(streamed)
            if whole_s is None or streamed_s is None:
                break  # the rows are at their longest
            more_s.append(streamed_s - whole_s)
    return max(0.0, statistics.median(more_s)) / _UNIT_LAYERS


def _engine(source: Path, place: _Place, *, on_gpu: bool) -> Engine:
    budgets = Budgets(
        gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
        host_bytes=_BUDGET_BYTES,
        disk_bytes=_BUDGET_BYTES,
        spill_dir=source.parent / "spill",
    )
    return Engine.load(source, budgets=budgets, policy=place)


def _sweeps_s(engine: Engine, num_rows: int, seconds: float) -> list[float]:
    """Sweeps in which every row decodes, for that long, less what they wait for weights."""
    prompts = _prompts(num_rows, max_tokens=engine.max_context_tokens - _PROMPT_TOKENS)
    with _carrying(engine, prompts):
        taken_s: list[float] = []
        ends_s = time.perf_counter() + seconds
        while len(taken_s) < _LEAST_SWEEPS or time.perf_counter() < ends_s:
            swept_s = _swept_s(engine)
            if swept_s is None:
                break  # the rows are at their longest
            taken_s.append(swept_s)
    return taken_s


def _swept_s(engine: Engine) -> float | None:
    """A sweep's seconds, less what it waits for weights; None if rows ended with it."""
    waited_s = engine.report().weights_waited_s
    started_s = time.perf_counter()
    if engine.sweep():
        return None
    swept_s = time.perf_counter() - started_s
    return swept_s - (engine.report().weights_waited_s - waited_s)


def _prompt_sweeps_s(engine: Engine, seconds: float) -> list[float]:
    """Sweeps of many prompts, whose rows end with them, for that long."""
    prompts = _prompts(_ROWS[1], max_tokens=1)
    taken_s: list[float] = []
    ends_s = time.perf_counter() + seconds
    while len(taken_s) < _LEAST_SWEEPS or time.perf_counter() < ends_s:
        for prompt in prompts:
            engine.submit(prompt)
        started_s = time.perf_counter()
        engine.sweep()
        taken_s.append(time.perf_counter() - started_s)
    return taken_s


def _prompts(count: int, *, max_tokens: int) -> list[Prompt]:
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return [
        Prompt(key=str(row), token_ids=(row + 1,) * _PROMPT_TOKENS, sampling=sampling)
        for row in range(count)
    ]


@contextlib.contextmanager
def _carrying(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[None]:
    for prompt in prompts:
        engine.submit(prompt)
    engine.sweep()  # the prompts' own
    yield
    for prompt in prompts:
        engine.cancel(prompt.key)


def _everything_resident(shape: ModelShape, budgets: Budgets) -> Policy:
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    return Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=_ROWS[1],
        sweep_tokens=_ROWS[1] * _PROMPT_TOKENS,
        micro_batch_tokens=_ROWS[1] * (_PROMPT_TOKENS + 1),
        kv=Split.on(compute, _KV_BYTES),
        layer_splits=tuple(Split.on(compute, num_bytes) for num_bytes in shape.layer_bytes),
        reason="overheads are measured",
    )


def _little_streamed(shape: ModelShape, budgets: Budgets) -> Policy:
    resident = _everything_resident(shape, budgets)
    splits = []
    for tensors, num_bytes in zip(shape.layers, shape.layer_bytes, strict=True):
        kept = Split.on(resident.compute, leading_border_bytes(tensors, num_bytes - _UNIT_BYTES))
        splits.append(dataclasses.replace(kept, disk_bytes=num_bytes - kept.total_bytes))
    return dataclasses.replace(resident, layer_splits=tuple(splits))


def _dense(num_layers: int) -> Any:
    return transformers.LlamaConfig(**_common(num_layers))


def _with_experts(num_layers: int) -> Any:
    return transformers.MixtralConfig(
        **_common(num_layers),
        num_local_experts=_NUM_EXPERTS,
        num_experts_per_tok=_NUM_CHOSEN,
        tie_word_embeddings=False,
    )


def _common(num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": 2 * _HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
