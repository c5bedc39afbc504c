"""Where attention over a tier's keys and values is computed: here, or on the CPU beside them.

A third way, bringing them here, is in `fetched`. Knows tensors, threads and devices; no model.
"""

import concurrent.futures
import contextlib
from typing import Final, Protocol

import torch
from greenlet import getcurrent

from engine.compute.packing import New, Packing, write_and_attend
from engine.compute.segments import Head
from engine.memory.kv_cache import KVCache
from engine.timeline import Timeline, Track

PARKED: Final = object()
"""What a forward hands its driver when it waits for attention, and not at a layer's border."""


class Route(Protocol):
    """How the rows of one tier attend."""

    cache: KVCache

    def prepare(self, packing: Packing, layer: int) -> None:
        """Called in the order of the steps, for each before the one ahead of it runs; `layer` is the
        first of its attentions, if there are several.
        """
        ...

    def attend(self, new: New, *, packing: Packing, layer: int, head: Head) -> torch.Tensor:
        """Write what is new, attend; (tokens, heads, value_size) on the device of `new`."""
        ...

    def settle(self) -> None:
        """At a sweep's end: wait for what is under way; raise what failed."""
        ...

    def abandon(self) -> None:
        """After a sweep that broke off: wait for what is under way, whatever becomes of it."""
        ...

    def close(self) -> None: ...


class Here:
    """The keys and values lie on the compute tier."""

    def __init__(self, cache: KVCache, timeline: Timeline) -> None:
        self.cache = cache
        self._timeline = timeline

    def prepare(self, packing: Packing, layer: int) -> None:
        return

    def attend(self, new: New, *, packing: Packing, layer: int, head: Head) -> torch.Tensor:
        home, dtype = new.query.device, new.query.dtype
        moved = new.to(self.cache.device, self.cache.dtype)
        with attention_span(self._timeline, moved, packing=packing, layer=layer, head=head):
            pool = self.cache.layer(layer)
            answer = write_and_attend(pool, moved, packing=packing, head=head)
        return answer.to(home, dtype)

    def settle(self) -> None:
        return

    def abandon(self) -> None:
        return

    def close(self) -> None:
        return


class Beside:
    """On the CPU, where the keys and values lie, by a thread of its own: queries go there, answers
    come back, and while it computes the driver lets other micro-batches go on.
    """

    def __init__(self, cache: KVCache, timeline: Timeline) -> None:
        self.cache = cache
        self._timeline = timeline
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "freight-attention")

    def prepare(self, packing: Packing, layer: int) -> None:
        return

    def attend(self, new: New, *, packing: Packing, layer: int, head: Head) -> torch.Tensor:
        home, dtype = new.query.device, new.query.dtype
        moved = new.to(self.cache.device, self.cache.dtype)
        sent = sent_event(home)
        job = self._pool.submit(self._attend, moved, sent, packing, layer, head)
        park()
        return job.result().to(home, dtype, non_blocking=True)

    def _attend(  # noqa: PLR0917 - handed to a thread
        self,
        new: New,
        sent: torch.cuda.Event | None,
        packing: Packing,
        layer: int,
        head: Head,
    ) -> torch.Tensor:
        if sent is not None:
            sent.synchronize()
        with (
            torch.inference_mode(),
            attention_span(self._timeline, new, packing=packing, layer=layer, head=head),
        ):
            return write_and_attend(self.cache.layer(layer), new, packing=packing, head=head)

    def settle(self) -> None:
        return  # every answer has been waited for

    def abandon(self) -> None:
        self._pool.submit(lambda: None).result()

    def close(self) -> None:
        self._pool.shutdown()


def attention_span(
    timeline: Timeline, new: New, *, packing: Packing, layer: int, head: Head
) -> contextlib.AbstractContextManager[None]:
    """Notes what is computed in it. On a GPU nothing: there it is only asked for, and is part of the
    layer's own span.
    """
    if new.query.device.type != "cpu":
        return contextlib.nullcontext()
    seen = packing.attended(head.window)
    num_heads, _, key_size = new.query.shape
    kv_heads, _, value_size = new.value.shape
    sizes = key_size + value_size
    return timeline.span(
        Track.ATTENTION,
        f"attention {layer}",
        num_bytes=seen.num_cached * kv_heads * sizes * new.key.itemsize,
        flops=2 * num_heads * sizes * seen.num_pairs,
    )


def park() -> None:
    """Give way to the driver until it resumes this forward."""
    driver = getcurrent().parent
    assert driver is not None, "attention beside the cache runs in lockstep only"
    driver.switch(PARKED)


def sent_event(device: torch.device) -> torch.cuda.Event | None:
    """Passed once all that was asked of the GPU so far is done; None on a CPU, where it is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record(torch.cuda.current_stream(device))
    return event
