"""The leg that is transformers' `generate` in padded batches, its model resident or on disk.

With `folder` of the options the decoder layers, the embedding and the head are on "disk" for
Accelerate's hooks; without it the whole model is in memory.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.legs.job import Job, Result, emit, read_bytes, this_job, total_tokens
from bench.workloads import Request


def load(options: dict[str, Any]) -> Any:
    path = Path(options["checkpoint"])
    dtype = getattr(torch, options["dtype"])
    if path.suffix == ".gguf":
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype
        )
    if not options.get("folder"):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    places: dict[str, Any] = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu"}
    places["model.rotary_emb"] = "cpu"
    num_layers = transformers.AutoConfig.from_pretrained(path).num_hidden_layers
    places |= {f"model.layers.{layer}": "disk" for layer in range(num_layers)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map=places, offload_folder=options["folder"]
    )


def answer_batch(model: Any, batch: Sequence[Request], eos: int | None) -> dict[str, list[int]]:
    """One left-padded batch until its slowest row is done; a row keeps up to its limit and end."""
    longest = max(len(request.token_ids) for request in batch)
    padding = [longest - len(request.token_ids) for request in batch]
    pad = eos or 0
    ids = torch.tensor(
        [[pad] * width + list(r.token_ids) for width, r in zip(padding, batch, strict=True)]
    )
    mask = torch.tensor([[0] * width + [1] * (longest - width) for width in padding])
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(request.max_tokens for request in batch),
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    answers = {}
    for request, row in zip(batch, found[:, longest:].tolist(), strict=True):
        kept = row[: request.max_tokens]
        answers[request.key] = kept[: kept.index(eos)] if eos in kept else kept
    return answers


def run(model: Any, job: Job, *, started_s: float) -> None:
    """Answer the job in batches, with a result after each, so that a leg cut short still tells."""
    transformers.utils.logging.disable_progress_bar()
    eos = None if job.ignore_eos else model.generation_config.eos_token_id
    model.generation_config.eos_token_id = eos
    answer_batch(model, [Request(key="", token_ids=(2, 3), max_tokens=1)], eos)  # warm-up
    load_s = time.perf_counter() - started_s
    requests = job.requests
    if job.options.get("is_sorted"):
        requests = tuple(sorted(requests, key=lambda request: -len(request.token_ids)))
    size = job.options["batch"]
    answers: dict[str, list[int]] = {}
    started_read_bytes = read_bytes()
    begun_s = time.perf_counter()

    def tell(seconds: float) -> None:
        emit(
            Result(
                seconds=seconds,
                load_s=load_s,
                output_tokens=sum(map(len, answers.values())),
                total_tokens=total_tokens(requests, answers),
                read_bytes=read_bytes() - started_read_bytes,
                is_whole=len(answers) == len(requests),
                answers=answers,
            )
        )

    tell(seconds=0.0)
    for start in range(0, len(requests), size):
        answers |= answer_batch(model, requests[start : start + size], eos)
        tell(time.perf_counter() - begun_s)


def main() -> int:
    job = this_job()
    started_s = time.perf_counter()
    with torch.inference_mode():
        run(load(job.options), job, started_s=started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
