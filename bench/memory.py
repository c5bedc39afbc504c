"""Ragged requests with the model in memory: Freight beside padded `generate` and llama.cpp's server.

    make bench-peers
    python -m bench.memory .models/SmolLM2-135M-Instruct.Q4_1.gguf [--rows 48 --quick]

Prompts of 16 to 512 tokens of real text, answers of at most 8 to 256, end of sequence honoured. Each
engine answers the same token ids in a process of its own on the same cores, one after the other.
`generate` takes them in order of arrival, in batches of one size, each running until its slowest row
is done; one more leg lets it sort them by length. llama.cpp gets the model's values in each format.
A ceiling is the rate of matrix products in a dtype, measured in the same run, over the
multiplications that the answered tokens need. Exits with 1 if the answers of one of Freight's legs
change.
"""

import argparse
import dataclasses
import json
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.contenders import DTYPES
from bench.legs.job import Job
from bench.peers import DEFAULT_CACHE, absolute, llama_program
from bench.runner import Bench, Leg, Outcome, usable_cpus
from bench.workloads import Request
from engine.tokenizer import Tokenizer

_FREIGHT: Final = "Freight"
_GENERATE: Final = "generate"
_LLAMA: Final = "llama.cpp server"
_STORED: Final = "stored"
"""The format that the checkpoint comes in."""
_GIB: Final = 2**30


_LEAST_PROMPT: Final = 16
_LEAST_ANSWER: Final = 8


def ragged_requests(tokenizer: Tokenizer, arguments: argparse.Namespace) -> tuple[Request, ...]:
    """Chat prompts whose lengths, template included, are spread evenly up to the longest."""
    draw = random.Random(arguments.seed)
    topics = sorted(pydoc_data.topics.topics.items())
    empty = len(tokenizer.render_chat([{"role": "user", "content": ""}]))
    requests = []
    for index in range(arguments.rows):
        _, text = topics[draw.randrange(len(topics))]
        wanted = max(1, draw.randint(_LEAST_PROMPT, arguments.longest_prompt) - empty)
        words = tokenizer.encode((text * 6)[: 8 * wanted])[:wanted]
        content = tokenizer.decode(words)
        token_ids = tokenizer.render_chat([{"role": "user", "content": content}])
        limit = draw.randint(_LEAST_ANSWER, arguments.longest_answer)
        requests.append(Request(key=str(index), token_ids=tuple(token_ids), max_tokens=limit))
    return tuple(requests)


def needed_flops(
    requests: Sequence[Request], answers: Mapping[str, Sequence[int]], found: Any
) -> float:
    """Multiplications of the layers for every token, of the head for every answered one, and of
    attention over each row's own context.
    """
    flops = 0.0
    for request in requests:
        answered = max(1, len(answers[request.key]))
        tokens = len(request.token_ids) + answered - 1
        attention = 4 * found["attention_width"] * tokens * (tokens + 1) / 2
        products = found["layer_parameters"] * tokens + found["head_parameters"] * answered
        flops += 2 * products + attention
    return flops


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Legs:
    """What is compared, as legs."""

    model: Path
    cache: Path

    def freight(self, dtype: str, block_rows: int | None) -> Leg:
        options = {
            "checkpoint": str(self.model),
            "spill_dir": str(self.cache / "spill"),
            "host_bytes": 8 * _GIB,
            "block_rows": block_rows,
            "dtype": dtype,
        }
        return Leg(engine=_FREIGHT, setting=dtype, module="freight", options=options)

    def generate(self, batch: int, *, is_sorted: bool = False) -> Leg:
        options = {"checkpoint": str(self.model), "dtype": "float32", "batch": batch}
        return Leg(
            engine=_GENERATE,
            setting=f"batch {batch}{', sorted by length' if is_sorted else ''}",
            module="padded",
            options=options | {"is_sorted": is_sorted},
        )

    def llama(self, kind: str, slots: int) -> Leg:
        options = {
            "checkpoint": str(self._stored_as(kind)),
            "program": str(llama_program(self.cache, "llama-server")),
            "slots": slots,
        }
        setting = f"{kind}, {slots} slots"
        return Leg(engine=_LLAMA, setting=setting, module="llama_server", options=options)

    def _stored_as(self, kind: str) -> Path:
        """The model's own values in another format, written once."""
        if kind == _STORED:
            return self.model
        path = self.cache / "models" / f"{self.model.stem}-as-{kind}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            program = str(llama_program(self.cache, "llama-quantize"))
            command = [program, "--allow-requantize", str(self.model), str(partial), kind]
            subprocess.run(command, check=True, capture_output=True)
            partial.rename(path)
        return path


def measure(bench: Bench, job: Job, legs: Legs, arguments: argparse.Namespace) -> list[Outcome]:
    """Freight, then every setting of the others; in later repetitions only each one's best."""
    ours = [legs.freight(DTYPES[kind], arguments.block_rows) for kind in arguments.freight_dtypes]
    first = [bench.run(leg, job) for leg in ours]
    first += [bench.run(legs.generate(size), job) for size in arguments.batch_sizes]
    first += [
        bench.run(legs.llama(kind, slots), job)
        for kind in arguments.llama_formats
        for slots in arguments.llama_slots
    ]
    outcomes = list(first)
    for _ in range(arguments.repetitions - 1):
        outcomes += [bench.run(leg, job) for leg in ours]
        for engine in (_GENERATE, _LLAMA):
            best = best_of(first, engine)
            outcomes += [bench.run(best.leg, job)] if best else []
    best = best_of(first, _GENERATE)
    if best and not arguments.quick:
        leg = legs.generate(best.leg.options["batch"], is_sorted=True)
        outcomes.append(bench.run(leg, job))
    return outcomes


def best_of(outcomes: Sequence[Outcome], engine: str) -> Outcome | None:
    tried = [o for o in outcomes if o.leg.engine == engine and o.output_tokens_per_s]
    return max(tried, key=lambda outcome: outcome.output_tokens_per_s or 0.0, default=None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One of Freight's legs, which all others are put beside, and the ceiling of its dtype."""

    name: str
    dtype: str
    rate: float
    ceiling: float


def freight_figures(
    outcomes: Sequence[Outcome], job: Job, found: Mapping[str, Any]
) -> Iterator[Ours]:
    """Of every leg of Freight's that answered; of the others it is told why they did not."""
    for name, group in by_name(outcomes).items():
        last = group[-1]
        if last.leg.engine == _FREIGHT and last.result is None:
            print(f"{name}: {last.ending}: {last.last_words}")
        elif last.leg.engine == _FREIGHT and last.result is not None:
            dtype = last.leg.options["dtype"]
            rate = found["flops_per_s"][dtype]
            floor_s = needed_flops(job.requests, last.result.answers, found) / rate
            ceiling = last.result.output_tokens / floor_s
            print(
                f"{name}: {last.result.output_tokens} output tokens. Products {rate / 1e9:.0f} "
                f"GFLOP/s: the answers cost at least {floor_s:.1f} s, so the ceiling is "
                f"{ceiling:.0f} output tok/s"
            )
            rates = [outcome.output_tokens_per_s or 0.0 for outcome in group]
            middle = statistics.median(rates)
            yield Ours(name=name, dtype=dtype, rate=middle, ceiling=ceiling)


def print_table(outcomes: Sequence[Outcome], job: Job, found: Mapping[str, Any]) -> None:
    """The share is of the ceiling of Freight's leg in the same dtype, or of its first leg."""
    print(f"{len(job.requests)} requests")
    ours = list(freight_figures(outcomes, job, found))
    if not ours:
        return
    compared = "".join(f" {each.name} is |" for each in ours)
    titles = "seconds (min-max) | output tokens | output tok/s | share of the ceiling"
    print(f"\n| | {titles} |{compared}\n|{(5 + len(ours)) * '---|'}")
    for name, group in by_name(outcomes).items():
        print(_line(name, group, ours))
    for each in ours:
        print(f"| ceiling of {each.name} | | | {each.ceiling:.1f} | |{len(ours) * ' |'}")
    for each in ours:
        last = by_name(outcomes)[each.name][-1].result
        if last is not None:
            print(f"\nThe report of {each.name}: {json.dumps(last.detail['report'])}")


def by_name(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    names = dict.fromkeys(outcome.leg.name for outcome in outcomes)
    return {name: [each for each in outcomes if each.leg.name == name] for name in names}


def _line(name: str, outcomes: Sequence[Outcome], ours: Sequence[Ours]) -> str:
    results = [outcome.result for outcome in outcomes if outcome.result and outcome.result.seconds]
    if not results:
        return f"| {name} | {outcomes[-1].ending} | | | |{len(ours) * ' |'}"
    seconds = [result.seconds for result in results]
    rate = statistics.median(result.output_tokens / result.seconds for result in results)
    dtype = outcomes[-1].leg.options.get("dtype")
    beside = next((each for each in ours if each.dtype == dtype), ours[0])
    cells = [
        name,
        f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})",
        str(results[-1].output_tokens),
        f"{rate:.1f}",
        f"{rate / beside.ceiling:.0%}",
    ]
    cells += ["" if each.name == name else f"{each.rate / rate:.2f} x" for each in ours]
    return f"| {' | '.join(cells)} |"


def check(outcomes: Sequence[Outcome]) -> int:
    """Padding and dtypes change rounding, so others may differ; a Freight leg's own answers may not."""
    answers = {
        name: [result.answers for outcome in group for result in outcome.results]
        for name, group in by_name(outcomes).items()
    }
    ours = [name for name, group in by_name(outcomes).items() if group[0].leg.engine == _FREIGHT]
    if not all(answers[name] for name in ours):
        return 1
    first = answers[ours[0]][0]
    for name, passes in answers.items():
        if passes and name != ours[0]:
            same = sum(first[key] == tokens for key, tokens in passes[-1].items())
            print(f"{same} of {len(first)} answers of {name} equal {ours[0]}'s token for token.")
    return 0 if all(each == answers[name][0] for name in ours for each in answers[name]) else 1


def main() -> int:
    arguments = parse_arguments()
    tokenizer = Tokenizer.load(arguments.model)
    job = Job(
        requests=ragged_requests(tokenizer, arguments),
        threads=len(arguments.cpus),
        ignore_eos=False,
        options={},
    )
    bench = Bench(cpus=arguments.cpus, deadline_s=arguments.leg_limit)
    found = bench.measure(job, {"checkpoint": str(arguments.model)})
    legs = Legs(model=arguments.model, cache=arguments.cache)
    outcomes = measure(bench, job, legs, arguments)
    print_table(outcomes, job, found)
    return check(outcomes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=absolute)
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--longest-prompt", type=int, default=512)
    parser.add_argument("--longest-answer", type=int, default=256)
    parser.add_argument("--freight-dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--block-rows", type=int, help="of Freight")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 32], help="of generate")
    parser.add_argument("--llama-formats", nargs="*", default=["Q8_0", "F16", "F32", _STORED])
    parser.add_argument("--llama-slots", type=int, nargs="+", default=[24])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repetition, nothing sorted")
    parser.add_argument("--leg-limit", type=float, default=900, help="seconds, loading included")
    parser.add_argument("--cpus", type=_cpus, default=usable_cpus(2), help="such as 0,1")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.repetitions = 1 if arguments.quick else arguments.repetitions
    return arguments


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
