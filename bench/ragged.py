"""Ragged requests in memory: Freight's engine beside `generate` at its best batch size, padded.

    python bench/ragged.py .models/SmolLM2-135M-Instruct.Q4_1.gguf

Prompts of 16 to 512 tokens of real text, answers of at most 8 to 256, end of sequence honoured. Both
answer the same requests in the same process, alternating; a request's tokens count up to its own
limit. `generate` takes them in order of arrival, in batches of one size, each running until its
slowest row is done; one more row lets it sort them by length first. The ceiling is the float32 GEMM
rate measured in the same run over the multiplications that the answered tokens need.
"""

import argparse
import dataclasses
import functools
import pydoc_data.topics
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.config import Prompt, Sampling
from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.planning.planners.base import Wishes
from engine.planning.planners.fixed import plan_fixed

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One pass over all requests."""

    name: str
    seconds: float
    tokens: dict[str, tuple[int, ...]]

    @property
    def output_tokens_per_s(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds


def ragged_prompts(engine: Engine, *, num_rows: int, seed: int) -> list[Prompt]:
    """Chat prompts whose lengths, template included, are spread evenly over 16 to 512 tokens."""
    draw = random.Random(seed)
    topics = sorted(pydoc_data.topics.topics.items())
    empty = len(engine.tokenizer.render_chat([{"role": "user", "content": ""}]))
    prompts = []
    for index in range(num_rows):
        _, text = topics[draw.randrange(len(topics))]
        wanted = max(1, draw.randint(16, 512) - empty)
        words = engine.tokenizer.encode((text * 6)[: 8 * wanted])[:wanted]
        content = engine.tokenizer.decode(words)
        token_ids = engine.tokenizer.render_chat([{"role": "user", "content": content}])
        sampling = Sampling(max_tokens=draw.randint(8, 256))
        prompts.append(Prompt(key=str(index), token_ids=tuple(token_ids), sampling=sampling))
    return prompts


def run_freight(engine: Engine, prompts: Sequence[Prompt]) -> Outcome:
    started_s = time.perf_counter()
    found = {completion.key: completion for completion in engine.generate(prompts)}
    seconds = time.perf_counter() - started_s
    return Outcome(
        name="Freight",
        seconds=seconds,
        tokens={key: completion.token_ids for key, completion in found.items()},
    )


def run_generate(model: Any, prompts: Sequence[Prompt], *, batch_size: int, name: str) -> Outcome:
    """Left-padded batches in the given order; every row counts up to its own limit and end."""
    eos = model.generation_config.eos_token_id
    tokens: dict[str, tuple[int, ...]] = {}
    started_s = time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(len(prompt.token_ids) for prompt in batch)
        padding = [longest - len(prompt.token_ids) for prompt in batch]
        ids = torch.tensor(
            [[eos] * pad + list(p.token_ids) for pad, p in zip(padding, batch, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        answers = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(prompt.sampling.max_tokens for prompt in batch),
            do_sample=False,
            pad_token_id=eos,
        )
        for prompt, answer in zip(batch, answers[:, longest:].tolist(), strict=True):
            kept = answer[: prompt.sampling.max_tokens]
            tokens[prompt.key] = tuple(kept[: kept.index(eos)] if eos in kept else kept)
    return Outcome(name=name, seconds=time.perf_counter() - started_s, tokens=tokens)


def gemm_flops_per_s(model: Any, *, num_rows: int = 512, repeats: int = 7) -> float:
    """The float32 rate of one layer's multiplications over `num_rows` rows, median of repeats."""
    layer = model.get_decoder().layers[0]
    weights = [p for p in layer.parameters() if p.ndim == 2]
    inputs = [torch.randn(num_rows, weight.shape[1]) for weight in weights]
    flops = sum(2 * num_rows * weight.numel() for weight in weights)
    rates: list[float] = []
    with torch.inference_mode():
        for _ in range(repeats):
            started_s = time.perf_counter()
            for _ in range(10):
                for value, weight in zip(inputs, weights, strict=True):
                    torch.nn.functional.linear(value, weight)
            rates.append(10 * flops / (time.perf_counter() - started_s))
    return statistics.median(rates)


def needed_flops(model: Any, prompts: Sequence[Prompt], outcome: Outcome) -> float:
    """Multiplications of the layers for every token, of the head for every answered one, and of
    attention over each row's own context.
    """
    config = model.config
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * model.get_decoder().layers[0].self_attn.head_dim
    flops = 0.0
    for prompt in prompts:
        answered = max(1, len(outcome.tokens[prompt.key]))
        tokens = len(prompt.token_ids) + answered - 1
        attention = 4 * width * config.num_hidden_layers * tokens * (tokens + 1) / 2
        flops += 2 * layers * tokens + 2 * head * answered + attention
    return flops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=2, help="of Freight and generate's best")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model.parent, gguf_file=arguments.model.name, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as spill, load(arguments.model, Path(spill)) as engine:
        prompts = ragged_prompts(engine, num_rows=arguments.rows, seed=arguments.seed)
        run_freight(engine, prompts[:4])
        outcomes = measure(engine, model, prompts, arguments)
        rate = gemm_flops_per_s(model)
        print_table(outcomes, needed_flops(model, prompts, outcomes[0]) / rate, rate)
    return check(outcomes)


def load(model: Path, spill: Path) -> Engine:
    budgets = measure_budgets(spill_dir=spill, gpu_bytes=0, host_bytes=8 * GIB)
    return Engine.load(
        model, budgets=budgets, policy=lambda shape, have: plan_fixed(shape, have, Wishes())
    )


def measure(
    engine: Engine, model: Any, prompts: Sequence[Prompt], arguments: argparse.Namespace
) -> list[Outcome]:
    """Freight first, each batch size of `generate` once, then the best of it and Freight again."""
    by_length = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))
    freight = functools.partial(run_freight, engine, prompts)
    outcomes = [note(freight)]
    sized: dict[int, Outcome] = {}
    for size in arguments.batch_sizes:
        name = f"generate, batch {size}"
        sized[size] = note(
            functools.partial(run_generate, model, prompts, batch_size=size, name=name)
        )
    best = min(sized, key=lambda size: sized[size].seconds)
    outcomes += sized.values()
    for _ in range(arguments.repeats - 1):
        name = f"generate, batch {best}"
        outcomes.append(note(freight))
        outcomes.append(
            note(functools.partial(run_generate, model, prompts, batch_size=best, name=name))
        )
    name = f"generate, batch {best}, sorted by length"
    outcomes.append(
        note(functools.partial(run_generate, model, by_length, batch_size=best, name=name))
    )
    return outcomes


def note(run: Callable[[], Outcome]) -> Outcome:
    outcome = run()
    print(f"  {outcome.name}: {outcome.seconds:.1f} s", file=sys.stderr)
    return outcome


def print_table(outcomes: Sequence[Outcome], floor_s: float, rate: float) -> None:
    num_tokens = sum(map(len, outcomes[0].tokens.values()))
    print(f"{len(outcomes[0].tokens)} requests, {num_tokens} output tokens")
    print(
        f"float32 GEMM {rate / 1e9:.0f} GFLOP/s: the answers cost at least {floor_s:.1f} s of it,"
    )
    print(f"so the ceiling is {num_tokens / floor_s:.0f} output tok/s\n")
    print("| | seconds (min-max) | output tok/s | share of the ceiling |")
    print("|---|---|---|---|")
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        seconds = [outcome.seconds for outcome in outcomes if outcome.name == name]
        median = statistics.median(seconds)
        rates = [o.output_tokens_per_s for o in outcomes if o.name == name]
        spread = f"{median:.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
        print(f"| {name} | {spread} | {statistics.median(rates):.1f} | {floor_s / median:.0%} |")
    freight = statistics.median(o.seconds for o in outcomes if o.name == "Freight")
    others = [outcome for outcome in outcomes if outcome.name != "Freight"]
    in_order = [outcome.seconds for outcome in others if "sorted" not in outcome.name]
    in_any = [outcome.seconds for outcome in others]
    print(f"\nFreight is {min(in_order) / freight:.1f} times as fast as generate's best in order")
    print(f"of arrival, {min(in_any) / freight:.1f} times as fast as its best of all.")


def check(outcomes: Sequence[Outcome]) -> int:
    """Padding changes rounding, so a padded row may differ; Freight's own answers may not."""
    freight = [outcome.tokens for outcome in outcomes if outcome.name == "Freight"]
    same = sum(freight[0][key] == tokens for o in outcomes[1:2] for key, tokens in o.tokens.items())
    print(f"{same} of {len(freight[0])} answers equal those of padded generate token for token.")
    return 0 if all(tokens == freight[0] for tokens in freight) else 1


if __name__ == "__main__":
    sys.exit(main())
