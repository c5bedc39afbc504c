"""What it costs to hold answers to schemas, and whether every one of them fits.

    python -m bench.structured .models/SmolLM2-135M-Instruct.Q4_1.gguf [--lines 200]

Blocks of lines with a schema and blocks of the same lengths without one take turns on one engine, so
that both meet the same weather. Costs are CPU seconds of the process for each generated token; the
masks alone are timed once more, over the tokens that were generated. Each block tells what it took, so
that a run that is cut off has shown something. Exits with 1 if one answer does not parse or does not
fit its schema.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import jsonschema
import numpy as np

from bench.schemas import SCHEMAS
from engine.config import Completion, Grammar, GrammarKind, Prompt, Sampling
from engine.engine import Engine
from engine.grammar import WORD_BITS, Grammars
from engine.memory.measure import measure_budgets
from engine.planning.planners.base import Wishes
from engine.planning.planners.fixed import plan_fixed
from engine.tokenizer import Tokenizer

_MAX_TOKENS: Final = 256
_BLOCK_LINES: Final = 100  # as many as the policy carries, so that few sweeps carry the last few


@dataclasses.dataclass(slots=True, kw_only=True)
class Cost:
    """Of all blocks of one kind."""

    num_tokens: int = 0
    cpu_s: float = 0.0

    @property
    def per_token_ms(self) -> float:
        return 1e3 * self.cpu_s / self.num_tokens


def held_prompts(tokenizer: Tokenizer, num_lines: int) -> Iterator[Prompt]:
    """Half of them greedy, half of them drawn."""
    for index, (name, schema) in zip(range(num_lines), itertools.cycle(SCHEMAS.items())):
        text = json.dumps(schema)
        message = {"role": "user", "content": f"Example {index}. Answer in JSON: {text}"}
        yield Prompt(
            key=f"{index}/{name}",
            token_ids=tuple(tokenizer.render_chat([message])),
            sampling=Sampling(
                max_tokens=_MAX_TOKENS,
                temperature=float(index // len(SCHEMAS) % 2),
                seed=index,
                grammar=Grammar(kind=GrammarKind.JSON_SCHEMA, text=text),
            ),
        )


def run(engine: Engine, prompts: Sequence[Prompt], cost: Cost) -> list[Completion]:
    started_s = time.process_time()
    found = list(engine.generate(prompts))
    cost.cpu_s += time.process_time() - started_s
    cost.num_tokens += sum(each.num_generated for each in found)
    return found


def free_prompts(prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[Prompt]:
    """The same without schemas, each as long as its answer was."""
    lengths = {answer.key: answer.num_generated for answer in answers}
    return [
        dataclasses.replace(
            prompt,
            sampling=dataclasses.replace(
                prompt.sampling, grammar=None, ignore_eos=True, max_tokens=lengths[prompt.key]
            ),
        )
        for prompt in prompts
    ]


def fault_of(answer: Completion) -> str | None:
    """Why it does not fit its schema."""
    try:
        jsonschema.validate(json.loads(answer.text), SCHEMAS[answer.key.split("/")[1]])
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{answer.key}: {answer.finish_reason}: {error}: {answer.text!r}"
    return None


def taking_turns(
    engine: Engine, prompts: Sequence[Prompt], held: Cost, free: Cost
) -> Iterator[Completion]:
    """The answers held to their schemas; after each block the same lengths without."""
    for start in range(0, len(prompts), _BLOCK_LINES):
        began_s = time.monotonic()
        some = prompts[start : start + _BLOCK_LINES]
        found = run(engine, some, held)
        run(engine, free_prompts(some, found), free)
        num_fitting = sum(fault_of(answer) is None for answer in found)
        taken_s = time.monotonic() - began_s
        print(f"{num_fitting} of {len(found)} lines fit; {taken_s:.0f} s", flush=True)
        yield from found


def mask_cost(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], answers: Sequence[Completion]
) -> Cost:
    grammars = Grammars(
        tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids
    )
    held = {prompt.key: prompt.sampling.grammar for prompt in prompts}
    mask = np.zeros(-(-tokenizer.vocab_size // WORD_BITS), np.int32)
    cost = Cost()
    grammars.matcher(next(grammar for grammar in held.values() if grammar))  # the tokens, once
    started_s = time.process_time()
    for answer in answers:
        grammar = held[answer.key]
        assert grammar is not None
        matcher = grammars.matcher(grammar)
        for position in range(len(answer.token_ids)):
            matcher.follow(answer.token_ids[:position])
            matcher.fill(mask)
            cost.num_tokens += 1
    cost.cpu_s = time.process_time() - started_s
    return cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lines", type=int, default=200)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.model)
    prompts = list(held_prompts(tokenizer, arguments.lines))
    held, free = Cost(), Cost()
    with tempfile.TemporaryDirectory() as spill:
        budgets = measure_budgets(spill_dir=Path(spill), gpu_bytes=0)
        policy = lambda shape, have: plan_fixed(shape, have, Wishes())  # noqa: E731
        with Engine.load(arguments.model, budgets=budgets, policy=policy) as engine:
            answers = list(taking_turns(engine, prompts, held, free))
    faults = [fault for answer in answers if (fault := fault_of(answer)) is not None]
    masks = mask_cost(tokenizer, prompts, answers)
    print(f"{len(answers) - len(faults)} of {len(answers)} answers fit {len(SCHEMAS)} schemas")
    print(f"with a schema    {held.num_tokens:7} tokens {held.per_token_ms:8.2f} ms CPU a token")
    print(f"without          {free.num_tokens:7} tokens {free.per_token_ms:8.2f} ms CPU a token")
    print(f"masks alone      {masks.num_tokens:7} tokens {masks.per_token_ms:8.3f} ms CPU a token")
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
