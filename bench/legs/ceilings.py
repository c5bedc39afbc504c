"""The leg that measures what the machine can do: direct sequential reads, and matrix products.

Rates of this moment, in the run that they are compared with: the engine's own reader over the very
weights file, and the faster of two float32 products at 512 rows over the model's own shapes.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from bench.legs.job import RESULT, this_job
from engine.memory.checkpoint import open_checkpoint
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer

_ROWS: Final = 512
_REPEATS: Final = 5
_PIECE_BYTES: Final = 128 * 2**20

Product = Callable[[torch.Tensor], torch.Tensor]


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


def linear_product(weight: torch.Tensor) -> Product:
    return lambda rows: torch.nn.functional.linear(rows, weight)


def pointwise_product(weight: torch.Tensor) -> Product:
    """The product of oneDNN, which torch itself does not choose for plain float32 weights."""
    multiply = getattr(torch.ops.mkldnn, "_linear_pointwise")  # noqa: B009 - no public name
    return lambda rows: multiply(rows, weight, None, "none", [], "")


def flops_per_s(
    shapes: list[tuple[int, int]],
    make: Callable[[torch.Tensor], Product],
    *,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Over one layer's products, median of repeats after one to warm up."""
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = [torch.randn(_ROWS, shape[1]).to(dtype) for shape in shapes]
    products = [make(weight) for weight in weights]
    flops = sum(2 * _ROWS * weight.numel() for weight in weights)
    seconds = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        for product, rows in zip(products, inputs, strict=True):
            product(rows)
        seconds.append(time.perf_counter() - started_s)
    return flops / statistics.median(seconds[1:])


def main() -> int:
    job = this_job()
    torch.set_num_threads(job.threads)
    config = open_checkpoint(Path(job.options["checkpoint"])).config
    shapes = layer_shapes(config)
    with torch.inference_mode():
        linear = flops_per_s(shapes, linear_product)
        onednn = flops_per_s(shapes, pointwise_product)
        bfloat16 = flops_per_s(shapes, linear_product, dtype=torch.bfloat16)
    weights_file = job.options.get("weights_file")
    found = {
        "disk_bytes_per_s": disk_bytes_per_s(Path(weights_file)) if weights_file else None,
        "linear_flops_per_s": linear,
        "onednn_flops_per_s": onednn,
        "bfloat16_flops_per_s": bfloat16,
        "layer_parameters": config.num_hidden_layers * sum(a * b for a, b in shapes),
        "head_parameters": config.vocab_size * config.hidden_size,
        "attention_width": config.num_hidden_layers * shapes[0][0],
    }
    print(RESULT + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
