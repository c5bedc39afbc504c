"""Attention over keys and values that are brought to the compute tier ahead and stored back behind.

One thread does both, in order: whatever it fetches, it has stored before. Knows tensors and devices;
no model.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence

import torch

from engine.compute.packing import New, Packing, write_and_attend
from engine.compute.routes import attention_span, sent_event
from engine.compute.segments import Head, Segment, Span
from engine.memory.copying import copy_by_one_thread
from engine.memory.kv_cache import KVCache
from engine.planning.policy import Tier
from engine.timeline import Timeline, Track


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Local:
    """A micro-batch's context copied to one place: which spans, and its packing there."""

    copies: tuple[tuple[Span, int], ...]
    packing: Packing


class Fetched:
    """Two sets of buffers take turns: one is attended over while the other is filled."""

    def __init__(self, cache: KVCache, *, device: torch.device, timeline: Timeline) -> None:
        self.cache = cache
        self._device = device
        self._timeline = timeline
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "freight-kv")
        self._locals: dict[int, _Local] = {}  # by the packing's identity, for one sweep
        self._coming: dict[tuple[int, int], concurrent.futures.Future[_Buffers]] = {}
        self._buffers = [_Buffers(device), _Buffers(device)]
        self._attended: _Buffers | None = None  # the last, free once that attention is over
        self._stores: list[concurrent.futures.Future[None]] = []

    def prepare(self, packing: Packing, layer: int) -> None:
        if id(packing) not in self._locals:
            self._locals[id(packing)] = _localize(packing, self._device)
        buffers = self._buffers[0]
        self._buffers.reverse()
        self._coming[id(packing), layer] = self._pool.submit(
            self._fetch, self._locals[id(packing)], layer, buffers
        )

    def attend(self, new: New, *, packing: Packing, layer: int, head: Head) -> torch.Tensor:
        local = self._locals[id(packing)]
        buffers = self._taken(packing, layer)
        self._require_stored()
        buffers.wait()
        home, dtype = new.query.device, new.query.dtype
        here = new.to(self._device, self.cache.dtype)
        with attention_span(self._timeline, here, packing=packing, layer=layer, head=head):
            pool = buffers.pool(self.cache.layer(layer), local.packing.num_slots)
            fresh = dataclasses.replace(
                here, is_kept=False
            )  # a buffer is filled with the past only
            answer = write_and_attend(pool, fresh, packing=local.packing, head=head)
        buffers.used = sent_event(self._device)
        if not new.is_kept:
            behind = here.to(self.cache.device, self.cache.dtype)
            self._stores.append(
                self._pool.submit(self._store, behind, sent_event(self._device), packing, layer)
            )
        return answer.to(home, dtype)

    def settle(self) -> None:
        for store in self._stores:
            store.result()
        self.abandon()

    def abandon(self) -> None:
        concurrent.futures.wait(self._coming.values())
        concurrent.futures.wait(self._stores)
        self._coming.clear()
        self._locals.clear()
        self._stores.clear()

    def close(self) -> None:
        self._pool.shutdown()
        self._buffers.clear()
        self._attended = None

    def _taken(self, packing: Packing, layer: int) -> "_Buffers":
        """What was fetched for that attention. A layer's second one nobody saw coming: what the first
        has attended over makes room for it.
        """
        coming = self._coming.pop((id(packing), layer), None)
        if coming is None:
            assert self._attended is not None, "a layer's first attention is prepared"
            local = self._locals[id(packing)]
            coming = self._pool.submit(self._fetch, local, layer, self._attended)
        self._attended = coming.result()
        return self._attended

    def _require_stored(self) -> None:
        """Raise what an earlier store raised, once, and forget those that are done."""
        done = [store for store in self._stores if store.done()]
        self._stores = [store for store in self._stores if not store.done()]
        for store in done:
            store.result()

    # -- the thread's side -----------------------------------------------------------------

    def _fetch(self, local: _Local, layer: int, buffers: "_Buffers") -> "_Buffers":
        pools = self.cache.layer(layer)
        on_disk = self.cache.tier is Tier.DISK
        if on_disk:
            for span, _ in local.copies:
                self.cache.read_ahead(layer, span.slot, span.num_tokens)
        num_bytes = sum(
            span.num_tokens * pool.shape[0] * pool.shape[2] * pool.itemsize
            for span, _ in local.copies
            for pool in pools
        )
        track = Track.DISK_READ if on_disk else Track.TO_GPU
        with (
            torch.inference_mode(),
            self._timeline.span(track, f"keys and values of layer {layer}", num_bytes=num_bytes),
        ):
            buffers.fill(pools, local.copies, local.packing.num_slots)
        return buffers

    def _store(self, new: New, sent: torch.cuda.Event | None, packing: Packing, layer: int) -> None:
        if sent is not None:
            sent.synchronize()
        keys, values = self.cache.layer(layer)
        track = Track.DISK_WRITE if self.cache.tier is Tier.DISK else Track.TO_CPU
        num_bytes = new.key.nbytes + new.value.nbytes
        name = f"keys and values of layer {layer}"
        with torch.inference_mode(), self._timeline.span(track, name, num_bytes=num_bytes):
            keys.index_copy_(1, packing.slots, new.key)
            values.index_copy_(1, packing.slots, new.value)


class _Buffers:
    """Room for one micro-batch's keys and values on the compute tier, and for a GPU its way there.

    `used` passes when the last attention over it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rooms: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]
        self._staging: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if device.type == "cuda"
            else None
        )
        self._filled: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None

    def pool(
        self, like: tuple[torch.Tensor, torch.Tensor], num_slots: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(kv_heads, num_slots, size) of keys and of values."""
        keys, values = (
            _shaped(room, each, num_slots) for room, each in zip(self._rooms, like, strict=True)
        )
        return keys, values

    def fill(
        self,
        pools: tuple[torch.Tensor, torch.Tensor],
        copies: Sequence[tuple[Span, int]],
        num_slots: int,
    ) -> None:
        if self.used is not None:
            self.used.synchronize()
        if self._filled is not None:
            self._filled.synchronize()  # the last copy has left the staging
        self._grow(pools, num_slots)
        targets = self._staging if self._stream is not None else self._rooms
        # Staging for a GPU is filled by as many threads as there are: no other computes meanwhile.
        copy = torch.Tensor.copy_ if self._stream is not None else copy_by_one_thread
        for pool, room in zip(pools, targets, strict=True):
            target = _shaped(room, pool, num_slots)
            for span, slot in copies:
                copy(
                    target[:, slot : slot + span.num_tokens],
                    pool[:, span.slot : span.slot + span.num_tokens],
                )
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                for pool, room, source in zip(pools, self._rooms, self._staging, strict=True):
                    target = _shaped(room, pool, num_slots)
                    target.copy_(_shaped(source, pool, num_slots), non_blocking=True)
                self._filled = sent_event(self._device)

    def wait(self) -> None:
        """Have the GPU's current stream wait for the last filling."""
        if self._filled is not None:
            torch.cuda.current_stream(self._device).wait_event(self._filled)

    def _grow(self, pools: tuple[torch.Tensor, torch.Tensor], num_slots: int) -> None:
        """Rooms are the filling stream's own: taken from another's, their memory might be in use by
        what that one has yet to compute, and be zeroed after it was filled.
        """
        for index, pool in enumerate(pools):
            wanted = pool.shape[0] * num_slots * pool.shape[2]
            if self._rooms[index].numel() < wanted:
                # First the smaller ones go: there is room for one of each.
                self._rooms[index] = self._staging[index] = torch.empty(0)
                # Zeros: attention may look behind a row's end, and 0 * NaN is NaN.
                if self._stream is None:
                    self._rooms[index] = torch.zeros(wanted, dtype=pool.dtype)
                    continue
                with torch.cuda.stream(self._stream):
                    self._rooms[index] = torch.zeros(wanted, dtype=pool.dtype, device=self._device)
                self._staging[index] = torch.zeros(wanted, dtype=pool.dtype, pin_memory=True)


def _shaped(room: torch.Tensor, like: torch.Tensor, num_slots: int) -> torch.Tensor:
    dims = (like.shape[0], num_slots, like.shape[2])
    return room[: math.prod(dims)].view(dims)


def _localize(packing: Packing, device: torch.device) -> _Local:
    """Every span of the packing once, one behind the other."""
    places: dict[Span, int] = {}
    copies: list[tuple[Span, int]] = []
    end = 0
    segments: list[Segment] = []
    for segment in packing.segments:
        for span in segment.prefix:
            if span not in places:
                places[span] = end
                copies.append((span, end))
                end += span.num_tokens
        own = segment.own
        past = Span(own.slot, own.start, segment.past - own.start)
        copies.append((past, end))
        segments.append(
            dataclasses.replace(
                segment,
                slot=end,
                prefix=tuple(
                    Span(places[span], span.start, span.num_tokens) for span in segment.prefix
                ),
            )
        )
        end += own.num_tokens
    slots = [slot for segment in segments for slot in segment.new_slots]
    return _Local(
        copies=tuple((span, slot) for span, slot in copies if span.num_tokens),
        packing=Packing(
            tier=packing.tier,
            segments=segments,
            slots=torch.tensor(slots, device=device),
            num_slots=end,
        ),
    )
