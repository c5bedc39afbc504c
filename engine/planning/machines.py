"""Machines that need not be at hand to be planned for; figures from their published sources."""

import dataclasses
from typing import Final

from engine.planning.hardware import Hardware, RateCurve

_GB: Final = 10**9
_GIB: Final = 2**30


def _attention(dtypes: tuple[str, ...], **rates: float) -> dict[str, RateCurve]:
    """Rates by tier, the same in every dtype and however many query heads share a key."""
    return {
        f"{tier}/{dtype}": RateCurve.flat(rate) for tier, rate in rates.items() for dtype in dtypes
    }


T4_208GB: Final = Hardware(
    name="T4 16 GB, 208 GB, NVMe",
    measured_on="2026-11-25",
    versions={"source": "FlexGen's shipped constants and paper; links and T4 by data sheet"},
    gpu_bytes=15 * _GIB,
    host_bytes=204 * _GIB,
    disk_bytes=1500 * _GIB,
    disk_read=RateCurve.flat(2.0e9),
    disk_write=RateCurve.flat(1.0e9),
    to_gpu_pinned_bytes_per_s=12.89 * _GIB,
    to_gpu_plain_bytes_per_s=6.0e9,
    from_gpu_bytes_per_s=12.0e9,
    memory_bytes_per_s=60e9,
    gemm={
        # FlexGen's fitted rates of decode, at 48 rows, and of prefill, here from 1024 rows on.
        "gpu/float16": RateCurve(((48.0, 4.3e12), (1024.0, 21.24e12))),
        "gpu/float32": RateCurve(((48.0, 2.5e12), (24576.0, 6.0e12))),
        "cpu/float16": RateCurve(((1.0, 20e9), (128.0, 500e9))),  # 2.0 GHz Xeon, AVX-512
        "cpu/float32": RateCurve(((1.0, 20e9), (128.0, 500e9))),
    },
    attention_bytes_per_s=_attention(("float16", "float32"), gpu=200e9, cpu=60e9),
    expand_bytes_per_s={
        "gpu/int4->float16": RateCurve.flat(60e9),
        "gpu/int8->float16": RateCurve.flat(100e9),
        # As many bytes are written as are read: half of what its memory gives, at most.
        "gpu/bfloat16->float16": RateCurve.flat(120e9),
        "cpu/float16->float32": RateCurve.flat(20e9),
    },
    # Each value is read or written two to three times: that part of what the memory gives.
    elementwise_bytes_per_s={
        "gpu/float16": 100e9,
        "gpu/float32": 100e9,
        "cpu/float16": 15e9,
        "cpu/float32": 20e9,
    },
    layer_overhead_s=1e-3,
    row_overhead_s=2e-4,
    sweep_overhead_s=5e-3,
)
"""The machine of the FlexGen paper, as its links and units could be driven."""

T4_208GB_AS_FLEXGEN: Final = dataclasses.replace(
    T4_208GB,
    name="T4 16 GB, 208 GB, NVMe, as FlexGen's runtime drove it",
    from_gpu_bytes_per_s=0.97 * _GIB,
    attention_bytes_per_s=_attention(("float16", "float32"), gpu=79e9, cpu=12.3e9),
)
"""The same machine at the rates that FlexGen's authors fitted to their own runs."""

RTX_4090_128GB: Final = Hardware(
    name="RTX 4090 24 GB, 128 GB, NVMe",
    measured_on="2026-11-25",
    versions={"source": "data sheets at the shares that are usually reached"},
    gpu_bytes=23 * _GIB,
    host_bytes=120 * _GIB,
    disk_bytes=1800 * _GB,
    disk_read=RateCurve(((131072.0, 2.0e9), (4194304.0, 7.0e9))),
    disk_write=RateCurve.flat(5.0e9),
    to_gpu_pinned_bytes_per_s=25e9,
    to_gpu_plain_bytes_per_s=10e9,
    from_gpu_bytes_per_s=25e9,
    memory_bytes_per_s=65e9,
    gemm={
        "gpu/bfloat16": RateCurve(((16.0, 12e12), (256.0, 80e12), (2048.0, 115e12))),
        "gpu/float16": RateCurve(((16.0, 12e12), (256.0, 80e12), (2048.0, 115e12))),
        "gpu/float32": RateCurve(((16.0, 6e12), (256.0, 35e12), (2048.0, 50e12))),
        "cpu/bfloat16": RateCurve(((1.0, 30e9), (128.0, 800e9))),
        "cpu/float16": RateCurve(((1.0, 30e9), (128.0, 800e9))),
        "cpu/float32": RateCurve(((1.0, 30e9), (128.0, 800e9))),
    },
    attention_bytes_per_s=_attention(("bfloat16", "float16", "float32"), gpu=800e9, cpu=60e9),
    expand_bytes_per_s={
        "gpu/int4->bfloat16": RateCurve.flat(250e9),
        "gpu/int8->bfloat16": RateCurve.flat(400e9),
        # Twice as many bytes are written as are read: a third of what host memory gives.
        "cpu/bfloat16->float32": RateCurve.flat(20e9),
        "cpu/float16->float32": RateCurve.flat(20e9),
    },
    elementwise_bytes_per_s={
        "gpu/bfloat16": 350e9,
        "gpu/float16": 350e9,
        "gpu/float32": 350e9,
        "cpu/bfloat16": 15e9,
        "cpu/float16": 15e9,
        "cpu/float32": 20e9,
    },
    layer_overhead_s=5e-4,
    row_overhead_s=1e-4,
    sweep_overhead_s=3e-3,
)

MACHINES: Final[dict[str, Hardware]] = {
    "t4-208gb": T4_208GB,
    "t4-208gb-flexgen": T4_208GB_AS_FLEXGEN,
    "rtx4090-128gb": RTX_4090_128GB,
}
