"""How much of weight I/O hides behind compute, and of compute behind I/O; looking ahead and not.

    python bench/overlap.py [--hidden-size 1024] [--layers 16] [--seed 0] ...

A Llama-shaped model of seeded random float32 weights is streamed from disk whole, each sweep anew.
In one regime a sweep carries many tokens, so that compute is the longer part; in the other few rows
decode, and reading is. Both run with look-ahead and without, over the same prompts. The hidden
shares are the report's own and, beside them, those of the trace's single spans. Exits with 1 if a
token differs.
"""

import argparse
import dataclasses
import functools
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape
from engine.sweep.report import Report
from engine.sweep.trace import ChromeTrace
from engine.timeline import COMPUTE, Timeline, Track

GIB = 2**30
VOCAB_SIZE = 8192

Span = tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What bounds a sweep, and the prompts that bring it about."""

    name: str
    num_rows: int
    """Of the block."""
    num_prompts: int
    prompt_tokens: int
    output_tokens: int

    def prompts(self, seed: int) -> list[Prompt]:
        draw = random.Random(seed)
        return [
            Prompt(
                key=str(row),
                token_ids=tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(self.prompt_tokens)),
                sampling=Sampling(max_tokens=self.output_tokens, ignore_eos=True),
            )
            for row in range(self.num_prompts)
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run: what it answered, its report, and the hidden shares that its trace's spans give."""

    regime: Regime
    overlap: bool
    tokens: dict[str, tuple[int, ...]]
    report: Report
    traced_io_share: float
    traced_compute_share: float


def write_model(folder: Path, *, hidden_size: int, num_layers: int, seed: int) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def streamed_policy(
    shape: ModelShape, budgets: Budgets, *, regime: Regime, overlap: bool
) -> Policy:
    """Every layer on the disk, and one micro-batch large enough for all that a sweep carries."""
    num_tokens = regime.num_rows * regime.prompt_tokens
    kv_tokens = regime.num_rows * (regime.prompt_tokens + regime.output_tokens + 64)
    return Policy(
        compute=Tier.CPU,
        compute_dtype=shape.compute_dtype,
        block_rows=regime.num_rows,
        sweep_tokens=num_tokens,
        micro_batch_tokens=max(256, num_tokens // 4),
        kv=Split.on(Tier.CPU, kv_tokens * shape.kv_bytes_per_token),
        layer_splits=tuple(
            Split(gpu_bytes=0, cpu_bytes=0, disk_bytes=layer_bytes)
            for layer_bytes in shape.layer_bytes
        ),
        reason=f"{regime.name}, everything streamed",
        overlap=overlap,
    )


def run(model: Path, folder: Path, regime: Regime, *, overlap: bool, seed: int) -> Outcome:
    trace = folder / f"{regime.name}-{'ahead' if overlap else 'behind'}.json"
    timeline = Timeline(sink=ChromeTrace(trace))
    budgets = Budgets(
        gpu_bytes=0, host_bytes=16 * GIB, disk_bytes=16 * GIB, spill_dir=folder / "spill"
    )
    policy = functools.partial(streamed_policy, regime=regime, overlap=overlap)
    with Engine.load(model, budgets=budgets, policy=policy, timeline=timeline) as engine:
        list(engine.generate([dataclasses.replace(regime.prompts(seed + 1)[0], key="warm-up")]))
        before = engine.report()
        tokens = {done.key: done.token_ids for done in engine.generate(regime.prompts(seed))}
        report = engine.report().since(before)
    io_share, compute_share = traced_shares(trace, report.num_sweeps)
    print(f"  {regime.name}, overlap {overlap}: {report.sweep_s:.1f} s", file=sys.stderr)
    return Outcome(
        regime=regime,
        overlap=overlap,
        tokens=tokens,
        report=report,
        traced_io_share=io_share,
        traced_compute_share=compute_share,
    )


def traced_shares(trace: Path, num_sweeps: int) -> tuple[float, float]:
    """Of the reading inside the last sweeps, the share beside compute; of compute, that beside it."""
    events = json.loads(trace.read_text())
    sweeps = _spans(events, [Track.SWEEP])[-num_sweeps:]
    reads = _within(_spans(events, [Track.DISK_READ]), sweeps)
    computes = _within(_spans(events, COMPUTE), sweeps)
    both_us = _total_us(_within(reads, computes))
    return both_us / _total_us(reads), both_us / _total_us(computes)


def _spans(events: Sequence[dict[str, Any]], tracks: Sequence[Track]) -> list[Span]:
    """Joined where they overlap, in order."""
    found = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and event["cat"] in tracks
    )
    joined: list[Span] = []
    for start, end in found:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _within(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    return [
        (max(start, first), min(end, last))
        for start, end in spans
        for first, last in others
        if max(start, first) < min(end, last)
    ]


def _total_us(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def print_table(outcomes: Sequence[Outcome]) -> None:
    print("| | look-ahead | sweeps | s | read s | compute s | I/O hidden (trace) ", end="")
    print("| compute hidden (trace) | bubbles s | of the roofline |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for each in outcomes:
        report = each.report
        print(
            f"| {each.regime.name} | {'on' if each.overlap else 'off'} | {report.num_sweeps} "
            f"| {report.sweep_s:.1f} | {report.io_s:.1f} | {report.compute_s:.1f} "
            f"| {report.hidden_io_share or 0:.0%} ({each.traced_io_share:.0%}) "
            f"| {report.hidden_compute_share or 0:.0%} ({each.traced_compute_share:.0%}) "
            f"| {report.bubbles_s:.2f} | {report.roofline_share or 0:.0%} |"
        )


def print_verdict(outcomes: Sequence[Outcome]) -> None:
    """Expected: at least 90% of the shorter part hidden. Reported, never enforced."""
    for each in outcomes:
        report = each.report
        if each.overlap:
            is_io_bound = report.io_s > report.compute_s
            what = "compute" if is_io_bound else "I/O"
            share = report.hidden_compute_share if is_io_bound else report.hidden_io_share
            print(f"{each.regime.name}: {share or 0:.0%} of {what} hidden, at least 90% expected")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="of the compute-bound regime")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the compute-bound regime")
    parser.add_argument("--long-sweeps", type=int, default=4, help="of the compute-bound regime")
    parser.add_argument("--few-rows", type=int, default=4, help="of the I/O-bound regime")
    parser.add_argument("--short-sweeps", type=int, default=12, help="of the I/O-bound regime")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    regimes = [
        Regime(
            name="compute-bound",
            num_rows=arguments.rows,
            num_prompts=arguments.rows * arguments.long_sweeps,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=1,
        ),
        Regime(
            name="I-O-bound",
            num_rows=arguments.few_rows,
            num_prompts=arguments.few_rows,
            prompt_tokens=4,
            output_tokens=arguments.short_sweeps,
        ),
    ]
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(
            folder / "model",
            hidden_size=arguments.hidden_size,
            num_layers=arguments.layers,
            seed=arguments.seed,
        )
        outcomes = [
            run(model, folder, regime, overlap=overlap, seed=arguments.seed)
            for regime in regimes
            for overlap in (True, False)
        ]
    print_table(outcomes)
    print_verdict(outcomes)
    pairs = zip(outcomes[::2], outcomes[1::2], strict=True)
    return 0 if all(ahead.tokens == behind.tokens for ahead, behind in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
