"""The leg that measures what the machine can do: direct sequential reads, and matrix products.

Rates of this moment, in the run that they are compared with: the engine's own reader over the very
weights file, and of each dtype the engine's own kernels at 512 rows over the model's own shapes.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from bench.contenders import DTYPES
from bench.legs.job import RESULT, this_job
from engine.compute.dtypes import COMPUTE_DTYPES
from engine.compute.gemm import Product, products_with
from engine.memory.checkpoint import open_checkpoint
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer

_ROWS: Final = 512
_REPEATS: Final = 5
_PIECE_BYTES: Final = 128 * 2**20


def disk_bytes_per_s(path: Path) -> float:
    size_bytes = path.stat().st_size // PAGE_BYTES * PAGE_BYTES
    buffer = HostBuffer(_PIECE_BYTES + 2 * PAGE_BYTES)
    with DirectReader(path) as reader:
        started_s = time.perf_counter()
        for start in range(0, size_bytes, _PIECE_BYTES):
            num_bytes = min(_PIECE_BYTES, size_bytes - start)
            reader.read(buffer, offset_bytes=start, num_bytes=num_bytes)
        return size_bytes / (time.perf_counter() - started_s)


def layer_shapes(config: Any) -> list[tuple[int, int]]:
    """Outputs and inputs of one Llama layer's products."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    wide = head_dim * config.num_attention_heads
    narrow = head_dim * config.num_key_value_heads
    return [
        (wide, hidden),
        (narrow, hidden),
        (narrow, hidden),
        (hidden, wide),
        (mlp, hidden),
        (mlp, hidden),
        (hidden, mlp),
    ]


def flops_per_s(shapes: list[tuple[int, int]], dtype: torch.dtype) -> float:
    """Over one layer's products, each way that the engine may multiply; the fastest way's."""
    inputs = [torch.randn(_ROWS, shape[1]).to(dtype) for shape in shapes]
    ways = [products_with(torch.randn(shape).to(dtype)) for shape in shapes]
    flops = sum(2 * _ROWS * outputs * inputs for outputs, inputs in shapes)
    return flops / min(seconds([products[name] for products in ways], inputs) for name in ways[0])


def seconds(products: Sequence[Product], inputs: Sequence[torch.Tensor]) -> float:
    """Median of repeats, after one to warm up."""
    taken = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        for product, rows in zip(products, inputs, strict=True):
            product(rows)
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken[1:])


def main() -> int:
    job = this_job()
    torch.set_num_threads(job.threads)
    config = open_checkpoint(Path(job.options["checkpoint"])).config
    shapes = layer_shapes(config)
    with torch.inference_mode():
        rates = {
            name: flops_per_s(shapes, dtype)
            for name, dtype in COMPUTE_DTYPES.items()
            if name in DTYPES.values()
        }
    weights_file = job.options.get("weights_file")
    found = {
        "disk_bytes_per_s": disk_bytes_per_s(Path(weights_file)) if weights_file else None,
        "flops_per_s": rates,
        "layer_parameters": config.num_hidden_layers * sum(a * b for a, b in shapes),
        "head_parameters": config.vocab_size * config.hidden_size,
        "attention_width": config.num_hidden_layers * shapes[0][0],
    }
    print(RESULT + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
