"""The leg that is AirLLM on the CPU: one layer in memory at a time, padded batches."""

import importlib
import sys
import time

import torch

from bench.legs.job import this_job
from bench.legs.padded import run


def main() -> int:
    """The checkpoint is split into layers where `folder` has no split of it yet."""
    job = this_job()
    started_s = time.perf_counter()
    airllm = importlib.import_module("airllm")  # lies in the benchmarks' cache, untyped
    model = airllm.AutoModel.from_pretrained(
        job.options["checkpoint"],
        device="cpu",
        dtype=getattr(torch, job.options["dtype"]),
        max_seq_len=job.options["max_tokens"],
        layer_shards_saving_path=job.options["folder"],
        prefetching=True,
    )
    with torch.inference_mode():
        run(model, job, started_s=started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
