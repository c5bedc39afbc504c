"""What a sweep costs beside bytes and FLOPs: a model too small to have any, run by the engine itself."""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
import transformers
from safetensors.torch import save_file

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.memory.safetensors import SINGLE_FILE
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape

_VOCAB_SIZE: Final = 128
_HIDDEN_SIZE: Final = 32
_HEADS: Final = 2
_FEW_LAYERS: Final = 2
_MANY_LAYERS: Final = 10
_MANY_ROWS: Final = 32
_PROMPT_TOKENS: Final = 4
_BUDGET_BYTES: Final = 2**30
_KV_BYTES: Final = 2**24
_LEAST_SWEEPS: Final = 4
_NUM_TURNS: Final = 3
_PREFIX: Final = ".freight-profile-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds: of a sweep whatever it carries, of each step, of each row, of each row in each step."""

    sweep_s: float
    step_s: float
    row_s: float
    row_step_s: float


def measure_overheads(spill_dir: Path, *, on_gpu: bool, seconds: float) -> Overheads:
    """By sweeps of few and of many layers, each with one row and with many; none is below 0.

    The seeded model and its pack lie in a folder in `spill_dir` that is gone afterwards.
    """
    layers, rows = (_FEW_LAYERS, _MANY_LAYERS), (1, _MANY_ROWS)
    ways = list(itertools.product(range(2), range(2)))
    taken_s: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=spill_dir, prefix=_PREFIX))
        )
        engines = [
            stack.enter_context(_engine(folder / f"layers-{count}", count, on_gpu=on_gpu))
            for count in layers
        ]
        # They take turns, so that others' load meets them alike.
        for _ in range(_NUM_TURNS):
            for which, count in ways:
                turn_s = seconds / len(ways) / _NUM_TURNS
                taken_s[which, count] += _sweeps_s(engines[which], rows[count], turn_s)
    # What other processes took is in the slower ones.
    quartiles = [statistics.quantiles(taken_s[way], n=4, method="inclusive")[0] for way in ways]
    return fit_overheads(quartiles, layers=layers, rows=rows)


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


def _engine(folder: Path, num_layers: int, *, on_gpu: bool) -> Engine:
    budgets = Budgets(
        gpu_bytes=_BUDGET_BYTES if on_gpu else 0,
        host_bytes=_BUDGET_BYTES,
        disk_bytes=_BUDGET_BYTES,
        spill_dir=folder / "spill",
    )
    source = _write_model(folder / "model", num_layers)
    return Engine.load(source, budgets=budgets, policy=_everything_resident)


def _sweeps_s(engine: Engine, num_rows: int, seconds: float) -> list[float]:
    """Sweeps in which every row decodes, for that long."""
    limit = engine.max_context_tokens - _PROMPT_TOKENS
    sampling = Sampling(max_tokens=limit, ignore_eos=True)
    prompts = [
        Prompt(key=str(row), token_ids=(row + 1,) * _PROMPT_TOKENS, sampling=sampling)
        for row in range(num_rows)
    ]
    with _carrying(engine, prompts):
        taken_s: list[float] = []
        ends_s = time.perf_counter() + seconds
        while len(taken_s) < _LEAST_SWEEPS or time.perf_counter() < ends_s:
            started_s = time.perf_counter()
            if engine.sweep():
                break  # the rows are at their longest
            taken_s.append(time.perf_counter() - started_s)
    return taken_s


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
        block_rows=_MANY_ROWS,
        sweep_tokens=_MANY_ROWS * _PROMPT_TOKENS,
        micro_batch_tokens=_MANY_ROWS * (_PROMPT_TOKENS + 1),
        kv=Split.on(compute, _KV_BYTES),
        layer_splits=tuple(Split.on(compute, num_bytes) for num_bytes in shape.layer_bytes),
        reason="overheads are measured",
    )


def _write_model(folder: Path, num_layers: int) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=2 * _HIDDEN_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / SINGLE_FILE)
    return folder
