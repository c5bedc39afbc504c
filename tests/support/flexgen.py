"""FlexGen's own cost model with its shipped constants, as a reference beside ours; OPT shapes only.

Formulas are those of its code (paper arXiv 2303.06865, A.3, with the code's changes): fractions are
(weights on GPU, CPU; KV on GPU, CPU; hidden on GPU, CPU), the rest lies on disk.
"""

import dataclasses
import math
from typing import Final

GIB: Final = 2**30
TO_GPU: Final = 12.89 * GIB
KV_FROM_GPU: Final = 0.97 * GIB
HIDDEN_FROM_GPU: Final = 4.82 * GIB
DISK_READ: Final = 0.473 * GIB
KV_TO_DISK_PREFILL: Final = 0.746 * GIB
TO_DISK: Final = 2.015 * GIB
WEIGHTS_DERATED: Final = 0.95
GEMM_PREFILL, GEMM_DECODE = 21.24e12, 4.3e12
BMM_PREFILL, BMM_DECODE = 9.97e12, 0.079e12
CPU_ATTENTION: Final = 0.0123e12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    num_layers: int
    hidden: int
    prompt: int
    generated: int
    gpu_batch: int
    num_gpu_batches: int
    weights: tuple[float, float]
    kv: tuple[float, float]

    @property
    def block(self) -> int:
        return self.gpu_batch * self.num_gpu_batches

    @property
    def layer_bytes(self) -> float:
        """W = 8 h1^2 + 4 h1 h2 with h2 = 4 h1."""
        return 24 * self.hidden**2


def prefill(case: Case) -> dict[str, float]:
    """Seconds of one layer for the whole block; hidden states all lie in host memory."""
    wg, wc = case.weights
    cg, cc = case.kv
    tokens = case.prompt * case.block
    hidden = 2 * tokens * case.hidden
    kv = 4 * (case.prompt + 1) * case.hidden * case.block
    attention = 4 * case.block * case.prompt**2 * case.hidden
    return {
        "ctog": ((1 - wg) * case.layer_bytes + hidden) / TO_GPU,
        "gtoc": (1 - cg) * kv / KV_FROM_GPU + hidden / HIDDEN_FROM_GPU,
        "dtoc": (1 - wg - wc) * case.layer_bytes / DISK_READ,
        "ctod": (1 - cg - cc) * kv / KV_TO_DISK_PREFILL,
        "comp": tokens * case.layer_bytes / GEMM_PREFILL + attention / BMM_PREFILL,
    }


def decode(case: Case) -> dict[str, float]:
    """Seconds of one layer in an average step."""
    wg, wc = case.weights
    cg, cc = case.kv
    context = case.prompt + case.generated / 2
    hidden = 2 * case.block * case.hidden
    kv = 4 * case.block * context * case.hidden
    new_kv = 4 * case.block * case.hidden
    gpu = case.block * case.layer_bytes / GEMM_DECODE + cg * kv / BMM_DECODE
    cpu = (1 - cg) * kv / (CPU_ATTENTION * _derated(case))
    disk_weights = (1 - wg - wc) * case.layer_bytes / (DISK_READ * WEIGHTS_DERATED)
    return {
        "ctog": ((1 - wg) * case.layer_bytes + hidden) / TO_GPU,
        "gtoc": hidden / HIDDEN_FROM_GPU,
        "dtoc": (1 - cg - cc) * kv / DISK_READ + disk_weights,
        "ctod": (1 - cg - cc) * new_kv / TO_DISK,
        "comp": gpu + cpu,
        "gpu": gpu,
        "cpu": cpu,
    }


def seconds(case: Case) -> float:
    """T = Tpre * l + Tgen * (n - 1) * l, with the sums and maxima of the code."""
    first, then = prefill(case), decode(case)
    t_pre = max(first["ctog"] + first["dtoc"], first["gtoc"] + first["ctod"], first["comp"])
    t_gen = then["ctog"] + max(then["gtoc"], then["dtoc"], then["ctod"], then["comp"])
    return (t_pre + t_gen * (case.generated - 1)) * case.num_layers


def tokens_per_s(case: Case) -> float:
    return case.block * case.generated / seconds(case)


def _derated(case: Case) -> float:
    a = max(0.0, math.log2(64 / case.gpu_batch))
    b = max(0.0, math.log2(4096 / case.hidden))
    return max(0.1, 1 + 0.0168 * a * b - 0.0328 * a - 0.0621 * b)
