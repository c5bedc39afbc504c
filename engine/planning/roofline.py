"""Seconds of each link and unit in one sweep under a policy; the formulas, and nothing decided.

T tokens of a sweep in K micro-batches, weights read once (offload-sota 2.1). Every function says
its formula; a rate is the machine's at the size that the engine really asks for.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

from engine.planning.cost import HEAD_TILE_BYTES
from engine.planning.flops import Work
from engine.planning.hardware import Hardware
from engine.planning.load import Load
from engine.planning.policy import Policy, Split, Tier
from engine.planning.routing import expected_experts
from engine.planning.shape import ModelShape, Placeable

_HIDDEN_ITEMSIZE: Final = 4
_ITEMSIZES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEVICES: Final = {Tier.GPU: "gpu", Tier.CPU: "cpu", Tier.DISK: "cpu"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is computed, and on what: the three that a cost is of.

    `kinds[i]` is the first layer that costs what layer i does, wherever the two lie.
    """

    shape: ModelShape
    work: Work
    hardware: Hardware
    kinds: tuple[int, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        work = self.work
        figures = zip(
            self.shape.layers,
            work.matrix_elements,
            work.expert_elements,
            work.windows,
            work.layer_kv_bytes,
            work.layer_values,
            work.layer_products,
            work.expert_products,
            strict=True,
        )
        first: dict[object, int] = {}
        kinds = tuple(first.setdefault(each, layer) for layer, each in enumerate(figures))
        object.__setattr__(self, "kinds", kinds)


def disk_read_s(hardware: Hardware, num_bytes: float, *, unit_bytes: float) -> float:
    """num_bytes / disk_read(unit_bytes): a unit is asked for at once, in pieces beside each other."""
    return num_bytes / hardware.disk_read.at(max(1.0, unit_bytes)) if num_bytes else 0.0


def bus_s(hardware: Hardware, num_bytes: float) -> float:
    """num_bytes / to_gpu: weights lie in pinned memory, home or staging buffer."""
    return num_bytes / _known(hardware.to_gpu_pinned_bytes_per_s) if num_bytes else 0.0


def micro_batches(policy: Policy, load: Load) -> int:
    """K = ceil(T / micro_batch_tokens); where keys and values are fetched, at least
    ceil(live tokens / fetch_tokens).
    """
    count = load.tokens / policy.micro_batch_tokens
    if not policy.attends_beside and policy.kv.total_bytes > policy.kv[policy.compute]:
        count = max(count, load.live_tokens / policy.fetch_tokens)
    return max(1, math.ceil(count - 1e-9))


def gemm_s(model: Model, policy: Policy, load: Load, *, layer: int) -> float:
    """2 * elements * T / gemm(T / K); of experts' elements at gemm(share * T / K), as each meets a
    share of a micro-batch only (`Work.expert_share`).
    """
    work, tokens = model.work, load.tokens
    rows = tokens / micro_batches(policy, load)
    experts = work.expert_elements[layer]
    dense = work.matrix_elements[layer] - experts
    taken_s = 2 * dense * tokens / _gemm_rate(model, policy, rows)
    if experts:
        taken_s += 2 * experts * tokens / _gemm_rate(model, policy, rows * work.expert_share)
    return taken_s


def head_s(model: Model, policy: Policy, load: Load) -> float:
    """2 * head elements * rows / gemm(rows): once a sweep, for the rows that sample alone. On a CPU
    in float32 whatever layers are computed in (`engine/compute/linear.py`).
    """
    if not load.rows:
        return 0.0
    rate = model.hardware.gemm_flops_per_s(
        _DEVICES[policy.compute], _head_dtype(policy), max(1.0, load.rows)
    )
    return model.work.head_flops(1) * load.rows / rate


def head_expand_s(model: Model, policy: Policy, load: Load) -> float:
    """The head's stored bytes / expand rate, once a sweep: as it is read row by row as well, no part of
    it is laid out for good.
    """
    taken_s = 0.0
    for tensor in model.shape.head_tensors:
        stored = tensor.stored_dtype or policy.compute_dtype
        taken_s += tensor.num_bytes / model.hardware.expand_rate(
            _DEVICES[policy.compute], stored, _head_dtype(policy), max(1.0, load.rows)
        )
    return taken_s


def _head_dtype(policy: Policy) -> str:
    return policy.compute_dtype if policy.compute is Tier.GPU else "float32"


def elementwise_s(model: Model, policy: Policy, load: Load, *, layer: int) -> float:
    """T * bytes of what goes into and out of a token's products / elementwise rate."""
    rate = model.hardware.elementwise_rate(_DEVICES[policy.compute], policy.compute_dtype)
    return load.tokens * model.work.layer_values[layer] * model.shape.compute_itemsize / rate


def expand_s(
    model: Model,
    policy: Policy,
    load: Load,
    tensors: tuple[Placeable, ...],
    *,
    streamed_share: float,
) -> float:
    """Of a layer's tensors: stored bytes / expand rate at the rows of a micro-batch, for each of them anew; of experts, those
    of so many as have tokens, at their share of the rows. What is stored in compute dtype is ready
    where it resides, but for experts, and may have to be laid out where it streams.
    """
    work, count = model.work, micro_batches(policy, load)
    rows = load.tokens / count
    taken_s = 0.0
    for tensor in tensors:
        stored = tensor.stored_dtype or policy.compute_dtype
        met, its_rows = 1.0, rows
        if tensor.is_stack and work.num_experts:
            met = _met_experts(model, rows) / work.num_experts
            its_rows *= work.expert_share
        elif _stays_ready(model.shape, policy, tensor):
            met = streamed_share
        rate = model.hardware.expand_rate(
            _DEVICES[policy.compute], stored, policy.compute_dtype, max(1.0, its_rows)
        )
        taken_s += count * met * tensor.num_bytes / rate
    return taken_s


def _stays_ready(shape: ModelShape, policy: Policy, tensor: Placeable) -> bool:
    """Where it resides: on a CPU also what takes no more bytes in compute dtype than as stored."""
    stored = tensor.stored_dtype
    if stored is None or policy.compute is Tier.GPU:
        return stored is None
    return _ITEMSIZES.get(stored, 0) >= shape.compute_itemsize


def _met_experts(model: Model, tokens: float) -> float:
    """That have any of so many tokens, chosen as chance has it (`routing.py`)."""
    work = model.work
    return expected_experts(work.num_experts, work.expert_share * work.num_experts, tokens)


def live_bytes(model: Model, load: Load, *, layer: int) -> float:
    """Keys and values that a layer's decoding rows read: rows see no further than its window."""
    window = model.work.windows[layer]
    seen = 1.0 if window is None else min(1.0, window / max(1.0, load.context_tokens))
    return load.live_tokens * seen * model.work.layer_kv_bytes[layer]


def heads_per_key(model: Model, *, layer: int) -> float:
    """Query heads to each key head: both heads' bytes of all queries over what a token keeps."""
    work = model.work
    every = work.num_heads * (work.key_size + work.value_size) * model.shape.compute_itemsize
    return max(1.0, every / max(1, work.layer_kv_bytes[layer]))


def attention_s(
    model: Model, policy: Policy, load: Load, *, layer: int, tier: Tier, share: float
) -> float:
    """Share * (live bytes / attention rate + prompt pairs' FLOPs / prompt rate + what each
    decoding row and each prompt costs beside).

    Decoding reads all live keys and values and is bound by that; of prompts scores and sums are
    products, and the rate goes with how many tokens they have.
    """
    if not share:
        return 0.0
    device = _DEVICES[tier]
    attended_rate = model.hardware.attention_rate(
        device, policy.compute_dtype, heads_per_key(model, layer=layer)
    )
    decode_s = live_bytes(model, load, layer=layer) / attended_rate
    window = model.work.windows[layer]
    pairs = load.prompt_pairs if window is None else min(load.prompt_pairs, float(window))
    flops = model.work.attention_flops(1) * pairs * load.prompt_tokens
    rate = model.hardware.prompt_rate(device, policy.compute_dtype, load.prompt_length)
    prompts = load.prompt_tokens / max(1.0, load.prompt_length)
    calls_s = load.rows * model.hardware.row_layer_overhead_s
    calls_s += prompts * model.hardware.prompt_layer_overhead_s
    return share * (decode_s + flops / rate + calls_s)


def overhead_s(
    model: Model,
    policy: Policy,
    load: Load,
    *,
    layer: int,
    num_units: int,
    read_s: float,
    fetched_s: float,
) -> float:
    """Of one layer: K visits, and the products in each; what its experts do that have any of T / K
    tokens, and their products; once, the units that it comes in, and what reading them, and keys and
    values of rows on disk, takes from a CPU that computes.
    """
    hardware, work = model.hardware, model.work
    count = micro_batches(policy, load)
    visit_s = hardware.layer_overhead_s
    visit_s += work.layer_products[layer] * hardware.product_overhead_s
    if work.num_experts and work.expert_elements[layer]:
        its_s = work.expert_products[layer] * hardware.product_overhead_s
        met = _met_experts(model, load.tokens / count)
        visit_s += met * (hardware.expert_overhead_s + its_s)
    beside_s = lost_s(model, policy, read_s=read_s, fetched_s=fetched_s)
    return count * visit_s + num_units * hardware.unit_overhead_s + beside_s


def lost_s(model: Model, policy: Policy, *, read_s: float, fetched_s: float) -> float:
    """Of compute on a CPU, beside what takes so long: lost share of reads * read_s, and of fetches *
    fetched_s.
    """
    if policy.compute is not Tier.CPU:
        return 0.0
    hardware = model.hardware
    return read_s * hardware.lost_beside_reads + fetched_s * hardware.lost_beside_fetches


def sweep_overhead_s(model: Model, policy: Policy, load: Load) -> float:
    """Sweep + rows * row, and the embedding's rows that are read one by one from disk."""
    hardware, split = model.hardware, policy.embedding_split
    read_s = 0.0
    if split is not None and split.disk_bytes:
        row_bytes = max(1.0, split.total_bytes / model.shape.vocab_size)
        read = load.tokens * row_bytes * split.disk_bytes / split.total_bytes
        read_s = read / hardware.disk_read.at(row_bytes)
    return hardware.sweep_overhead_s + load.rows * hardware.row_overhead_s + read_s


def kv_shares(model: Model, policy: Policy, kept_tokens: float) -> Mapping[Tier, float]:
    """Of the rows on each tier: the fastest that has room first (`engine/sweep/block.py`)."""
    need = kept_tokens * model.shape.kv_bytes_per_token
    if need <= 0:
        return {tier: float(tier is policy.compute) for tier in Tier}
    left = 1.0
    shares = {}
    for tier in Tier:
        shares[tier] = min(left, policy.kv[tier] / need)
        left -= shares[tier]
    total = sum(shares.values())
    return {tier: share / total for tier, share in shares.items()} if total else shares


def kv_disk_s(model: Model, policy: Policy, load: Load, share: float) -> float:
    """Share * live bytes of all layers / disk_read(one row's of a layer), attended there or not."""
    if not share:
        return 0.0
    layers = range(model.shape.num_layers)
    total = share * sum(live_bytes(model, load, layer=layer) for layer in layers)
    row_bytes = load.context_tokens * model.work.kv_bytes_per_token
    return disk_read_s(model.hardware, total, unit_bytes=row_bytes)


def moved_s(
    model: Model, policy: Policy, load: Load, shares: Mapping[Tier, float], *, layer: int
) -> tuple[float, float]:
    """Seconds of one layer's (bytes to the GPU, bytes from it), beside weights; on a CPU none.

    To it: fetched live keys and values, or answers of attention beside them; hidden states that
    wait elsewhere. From it: new keys and values, queries; hidden states.
    """
    if policy.compute is not Tier.GPU:
        return 0.0, 0.0
    shape, work, hardware = model.shape, model.work, model.hardware
    away = 1.0 - shares[Tier.GPU]
    itemsize = shape.compute_itemsize
    crossing = load.tokens * away
    upward, downward = 0.0, crossing * work.layer_kv_bytes[layer]
    heads = crossing * work.num_heads * itemsize
    if policy.attends_beside:
        upward += heads * work.value_size
        downward += heads * work.key_size
    else:
        upward += away * live_bytes(model, load, layer=layer)
    taken_s = upward / _known(hardware.to_gpu_plain_bytes_per_s) if upward else 0.0
    stored_s = downward / _known(hardware.from_gpu_bytes_per_s) if downward else 0.0
    if policy.hidden_tier is not None:
        hidden = load.tokens * shape.hidden_size * _HIDDEN_ITEMSIZE
        taken_s += hidden / _known(hardware.to_gpu_pinned_bytes_per_s)
        stored_s += hidden / _known(hardware.from_gpu_bytes_per_s)
    return taken_s, stored_s


def disk_store_s(model: Model, load: Load, share: float) -> float:
    """Share * T * bytes of a token's keys and values / disk_write."""
    num_bytes = share * load.tokens * model.shape.kv_bytes_per_token
    return num_bytes / model.hardware.disk_write.at(max(1.0, num_bytes)) if num_bytes else 0.0


def head_tiles(policy: Policy, *, layer_unit_bytes: float) -> list[Split]:
    """The head's streamed bytes in the policy's units, or else in such as large as a layer's, at least
    HEAD_TILE_BYTES.
    """
    split = policy.head_split
    streamed = split.streamed_bytes(policy.compute) if split else 0
    if split is None or not streamed:
        return []
    count = math.ceil(streamed / (policy.unit_bytes or max(layer_unit_bytes, HEAD_TILE_BYTES)))
    hosted = split.cpu_bytes if policy.compute is Tier.GPU else 0
    return [
        Split(gpu_bytes=0, cpu_bytes=hosted // count, disk_bytes=split.disk_bytes // count)
    ] * count


def _gemm_rate(model: Model, policy: Policy, rows: float) -> float:
    device = _DEVICES[policy.compute]
    return model.hardware.gemm_flops_per_s(device, policy.compute_dtype, max(1.0, rows))


def _known(rate: float | None) -> float:
    assert rate is not None, "a machine with a GPU has a link to it"
    return rate
