"""What a machine can do, as data: capacities, rates as curves, overheads; measures nothing."""

import bisect
import dataclasses
import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, TypeVar

from engine.errors import HardwareError

_T = TypeVar("_T")

_VERSION: Final = 3
"""Of the JSON form: raised when a field changes its meaning."""

MOST_OTHERS_SHARE: Final = 0.1
"""Of the cores' time: what was measured while others had more of it is not what a machine can do."""


@dataclasses.dataclass(frozen=True, slots=True)
class RateCurve:
    """A rate that depends on a size: (size, rate a second) pairs by rising size.

    Sizes are a request's bytes or a product's rows; rates bytes/s or FLOP/s. Raises HardwareError
    for no points, sizes that do not rise, and anything that is not positive.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        positive = all(0 < value < math.inf for point in self.points for value in point)
        if not self.points or not positive or sorted(set(sizes)) != sizes:
            raise HardwareError(
                "a rate curve has points of positive size and rate, sizes rising, and not "
                f"{self.points}"
            )

    @classmethod
    def flat(cls, rate: float) -> Self:
        """The same rate at every size."""
        return cls(((1.0, rate),))

    def at(self, size: float) -> float:
        """The rate at `size`: both on log scales between two points, the end's outside them."""
        right = bisect.bisect_left(self.points, size, key=operator.itemgetter(0))
        if right == 0:
            return self.points[0][1]
        if right == len(self.points):
            return self.points[-1][1]
        (low, low_rate), (high, high_rate) = self.points[right - 1 : right + 1]
        share = math.log(size / low) / math.log(high / low)
        return float(low_rate * (high_rate / low_rate) ** share)

    def scaled(self, factor: float) -> Self:
        """The same curve with every rate multiplied."""
        return type(self)(tuple((size, rate * factor) for size, rate in self.points))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine. Capacities in bytes, rates in bytes/s or FLOP/s, overheads in seconds.

    `gemm` has a curve over rows of the left factor for "<tier>/<compute dtype>", such as
    "cpu/float32". `attention_bytes_per_s`, by the same names, has the live keys and values that are
    attended to a second while a row decodes, over the query heads to each key head: a kernel may
    read a key for each of them. `prompt_flops_per_s` has what attention of prompts computes a
    second, over their tokens; where it was not measured, products' rates stand for it.
    `expand_bytes_per_s` has, over a product's rows, the stored bytes a second that are made ready
    for it, for "<tier>/<stored>-><compute dtype>", such as "cpu/bfloat16->float32": turned to compute
    dtype, and laid out as a kernel computes from, which may take time where nothing is turned.
    `elementwise_bytes_per_s` has, for "<tier>/<compute dtype>", the bytes that go into and come out
    of a layer's products a second while all is computed but products and attention.
    `spread` is, by a field's name, how far apart the tries of its measurement lay, relative.
    """

    name: str
    measured_on: str
    """ISO date; when written down, for a machine that was not measured."""
    versions: Mapping[str, str]
    """What else the figures hold for: "torch", "cpu", "gpu" and the like."""
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    disk_read: RateCurve
    """Over the bytes of one request."""
    disk_write: RateCurve
    to_gpu_pinned_bytes_per_s: float | None
    to_gpu_plain_bytes_per_s: float | None
    from_gpu_bytes_per_s: float | None
    memory_bytes_per_s: float
    """Reading host memory."""
    gemm: Mapping[str, RateCurve]
    attention_bytes_per_s: Mapping[str, RateCurve]
    expand_bytes_per_s: Mapping[str, RateCurve]
    elementwise_bytes_per_s: Mapping[str, float]
    layer_overhead_s: float
    """Of one layer's visit by one micro-batch, beside its arithmetic."""
    row_overhead_s: float
    """Of one row in one sweep: composed, sampled from, detokenised."""
    sweep_overhead_s: float
    row_layer_overhead_s: float = 0.0
    """Of one row in one layer."""
    prompt_layer_overhead_s: float = 0.0
    """Of one prompt that has tokens in a sweep, in one layer."""
    expert_overhead_s: float = 0.0
    """Of one expert that has tokens, in one layer of one micro-batch."""
    product_overhead_s: float = 0.0
    """Of one product of any size, beside its arithmetic and what the smallest one takes."""
    unit_overhead_s: float = 0.0
    """Of one unit of weights that streams: waited for no longer, and handed over and back."""
    lost_beside_reads: float = 0.0
    """Of what a CPU computes a second, the share that is lost while weights are read from disk."""
    lost_beside_fetches: float = 0.0
    """The same while rows' keys and values are copied from there."""
    prompt_flops_per_s: Mapping[str, RateCurve] = dataclasses.field(default_factory=dict)
    others_share: float = 0.0
    """Of the cores' time, what other processes took while this was measured."""
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_crowded(self) -> bool:
        """Whether others had so much of the cores meanwhile that the figures are to be taken again."""
        return self.others_share > MOST_OTHERS_SHARE

    def gemm_flops_per_s(self, tier: str, compute_dtype: str, num_rows: float) -> float:
        """Raises HardwareError where no such product was measured."""
        return _of(self.gemm, f"{tier}/{compute_dtype}", "gemm").at(num_rows)

    def attention_rate(self, tier: str, compute_dtype: str, heads_per_key: float) -> float:
        """Bytes/s of keys and values. Raises HardwareError where it was not measured."""
        name = f"{tier}/{compute_dtype}"
        return _of(self.attention_bytes_per_s, name, "attention_bytes_per_s").at(heads_per_key)

    def prompt_rate(self, tier: str, compute_dtype: str, num_tokens: float) -> float:
        """FLOP/s of attention of prompts of so many tokens. Raises HardwareError if it is not known."""
        name = f"{tier}/{compute_dtype}"
        if name not in self.prompt_flops_per_s:
            return self.gemm_flops_per_s(tier, compute_dtype, num_tokens)
        return self.prompt_flops_per_s[name].at(num_tokens)

    def expand_rate(self, tier: str, stored: str, compute_dtype: str, num_rows: float) -> float:
        """Stored bytes/s for a product of so many rows; infinite where nothing is to be done. Raises
        HardwareError if it is not known.
        """
        name = f"{tier}/{stored}->{compute_dtype}"
        if stored == compute_dtype and name not in self.expand_bytes_per_s:
            return math.inf
        return _of(self.expand_bytes_per_s, name, "expand_bytes_per_s").at(num_rows)

    def elementwise_rate(self, tier: str, compute_dtype: str) -> float:
        """Bytes/s of products' inputs and outputs. Raises HardwareError if it was not measured."""
        key = f"{tier}/{compute_dtype}"
        return _of(self.elementwise_bytes_per_s, key, "elementwise_bytes_per_s")

    def to_json(self) -> str:
        """Readable, one field a line; `from_json` gives an equal value back."""
        fields = {name: _plain(getattr(self, name)) for name in _names()}
        return json.dumps({"version": _VERSION, **fields}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises HardwareError for another version, an unknown, missing or misformed field."""
        fields = _parsed(text)
        version = fields.pop("version", None)
        if version != _VERSION:
            raise HardwareError(f"a hardware file has version {_VERSION}, this one {version!r}")
        if unknown := sorted(fields.keys() - set(_names())):
            raise HardwareError(f"a hardware file has no field {', '.join(unknown)}")
        if missing := sorted(set(_names()) - fields.keys() - _OPTIONAL):
            raise HardwareError(f"the hardware file lacks {', '.join(missing)}")
        return cls(**{name: _read(name, value) for name, value in fields.items()})


_OPTIONAL: Final = frozenset(
    {
        "spread",
        "row_layer_overhead_s",
        "prompt_layer_overhead_s",
        "expert_overhead_s",
        "product_overhead_s",
        "unit_overhead_s",
        "lost_beside_reads",
        "lost_beside_fetches",
        "prompt_flops_per_s",
        "others_share",
    }
)
"""Fields that a file may lack."""


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Hardware)]


def _of(table: Mapping[str, _T], key: str, what: str) -> _T:
    if key not in table:
        known = ", ".join(sorted(table)) or "nothing"
        raise HardwareError(f"this hardware's {what} has {known}, and {key} is needed")
    return table[key]


def _plain(value: Any) -> Any:
    if isinstance(value, RateCurve):
        return [list(point) for point in value.points]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _parsed(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise HardwareError(f"a hardware file is JSON, and this one is not: {error}") from error
    if not isinstance(fields, dict):
        raise HardwareError("a hardware file is one JSON object")
    return fields


def _read(name: str, value: Any) -> Any:
    try:
        return _READERS.get(name, float)(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise HardwareError(f"the hardware file's {name} cannot be {value!r}: {error}") from error


def _curve(value: Any) -> RateCurve:
    return RateCurve(tuple((float(size), float(rate)) for size, rate in value))


def _curves(value: Any) -> dict[str, RateCurve]:
    return {str(key): _curve(each) for key, each in value.items()}


def _rate_or_none(value: Any) -> float | None:
    return None if value is None else float(value)


def _rates(value: Any) -> dict[str, float]:
    return {str(key): float(each) for key, each in value.items()}


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "name": str,
    "measured_on": str,
    "versions": lambda value: {str(key): str(each) for key, each in value.items()},
    "gpu_bytes": int,
    "host_bytes": int,
    "disk_bytes": int,
    "disk_read": _curve,
    "disk_write": _curve,
    "to_gpu_pinned_bytes_per_s": _rate_or_none,
    "to_gpu_plain_bytes_per_s": _rate_or_none,
    "from_gpu_bytes_per_s": _rate_or_none,
    "gemm": _curves,
    "attention_bytes_per_s": _curves,
    "expand_bytes_per_s": _curves,
    "prompt_flops_per_s": _curves,
    "elementwise_bytes_per_s": _rates,
    "spread": _rates,
}
"""How a field is read where it is not a plain number."""
