"""Every greedy answer of the demo input beside the library's own, token for token.

    python bench/demo_oracle.py .models/SmolLM2-135M-Instruct.Q4_1.gguf [--host-memory 512MiB ...]

The oracle is `generate` in the same dtype, one prompt at a time, without padding. Freight answers the
whole input once for each host budget: with everything in memory, and with layers streamed from disk.
Exits with 1 if the smallest budget forced no streaming or, in float32, if one token of one answer
differs. In bfloat16 rounding decides between tokens that are nearly as likely: what is equal is told.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from cli.demo_input import demo_requests
from engine.config import Completion, Prompt, Sampling
from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.planning.planners.base import Wishes
from engine.planning.planners.fixed import plan_fixed
from engine.tokenizer import Tokenizer
from jobs.settings import parse_bytes


def demo_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    return [
        Prompt(
            key=request["custom_id"],
            token_ids=tuple(tokenizer.render_chat(request["body"]["messages"])),
            sampling=Sampling(max_tokens=request["body"]["max_tokens"]),
        )
        for request in demo_requests("demo")
    ]


def oracle_answers(model: Any, prompts: list[Prompt]) -> dict[str, tuple[int, ...]]:
    eos = model.generation_config.eos_token_id
    found = {}
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.sampling.max_tokens,
            do_sample=False,
            pad_token_id=eos,
        )[0, ids.shape[1] :].tolist()
        found[prompt.key] = tuple(answer[:-1] if answer[-1] == eos else answer)
    return found


def freight_answers(
    path: Path, prompts: list[Prompt], *, host_bytes: int, spill: Path, dtype: str
) -> tuple[dict[str, Completion], int, float]:
    """The answers, the weight bytes streamed from disk, and the seconds."""
    budgets = measure_budgets(spill_dir=spill, gpu_bytes=0, host_bytes=host_bytes)
    with Engine.load(
        path,
        budgets=budgets,
        policy=lambda shape, have: plan_fixed(shape, have, Wishes()),
        compute_dtype=dtype,
    ) as engine:
        started_s = time.perf_counter()
        found = {completion.key: completion for completion in engine.generate(prompts)}
        seconds = time.perf_counter() - started_s
        return found, engine.report().weights_streamed_bytes, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--host-memory", nargs="+", default=["8GiB", "512MiB"])
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    prompts = demo_prompts(Tokenizer.load(arguments.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model.parent,
        gguf_file=arguments.model.name,
        dtype=getattr(torch, arguments.compute_dtype),
    )
    expected = oracle_answers(model, prompts)
    num_tokens = sum(map(len, expected.values()))
    different = 0
    streamed = 0
    with tempfile.TemporaryDirectory() as spill:
        for size in arguments.host_memory:
            found, streamed, seconds = freight_answers(
                arguments.model,
                prompts,
                host_bytes=parse_bytes(size),
                spill=Path(spill),
                dtype=arguments.compute_dtype,
            )
            wrong = [key for key, tokens in expected.items() if found[key].token_ids != tokens]
            different += len(wrong)
            same = sum(leading(found[key].token_ids, tokens) for key, tokens in expected.items())
            print(
                f"host memory {size}: {len(prompts) - len(wrong)} of {len(prompts)} answers equal, "
                f"{same} of {num_tokens} tokens before the first that differs, "
                f"{streamed / 1e9:.1f} GB streamed, {seconds:.1f} s {wrong[:5]}"
            )
    exact = arguments.compute_dtype == "float32"
    return 1 if (exact and different) or not streamed else 0


def leading(found: tuple[int, ...], expected: tuple[int, ...]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(found), len(expected)))


if __name__ == "__main__":
    sys.exit(main())
