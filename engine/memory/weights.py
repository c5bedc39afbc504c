"""The weights of one model over its tiers: resident parts bound once, streamed parts fetched ahead
into slots. Knows packs, placements and devices; not what is computed.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from engine.errors import EngineError, PackError
from engine.memory.manifest import Pack, PackedTensor, PackGroup
from engine.memory.pack import check_tensors
from engine.memory.placement import (
    LayerParts,
    part_layer,
    read_tensors,
    span_bytes,
    split_groups,
    views_of,
)
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer
from engine.planning.cost import NUM_SLOTS
from engine.planning.policy import Split, Tier


@dataclasses.dataclass(slots=True)
class WeightCounters:
    """What streaming cost so far. `waited_s` is compute time lost to weights not yet there."""

    streamed_bytes: int = 0
    fetched_s: float = 0.0
    waited_s: float = 0.0


class WeightSource(Protocol):
    """What the executor needs of weights: a layer is there between `acquire` and `release`."""

    counters: WeightCounters

    def acquire(self, layer: int) -> None: ...
    def release(self, layer: int) -> None: ...
    def rewind(self) -> None: ...
    def close(self) -> None: ...


class _Slot:
    """A place on the compute tier that streamed parts take turns in, and its way there.

    `storage` is empty where the staging buffer itself is computed from.
    """

    def __init__(self, compute_bytes: int, staged_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.storage = torch.empty(compute_bytes, dtype=torch.uint8, device=device)
        self.staging = HostBuffer(staged_bytes + 2 * PAGE_BYTES, pinned=on_gpu)
        self.filled: torch.cuda.Event | None = _event() if on_gpu else None
        self.drained: torch.cuda.Event | None = _event() if on_gpu else None
        self.free = threading.Semaphore(1)


class StreamedWeights:
    """Binds every parameter of `model` once; layers visited in cyclic order find theirs filled.

    `acquire` blocks until the layer's part is there, `release` lets its slot be filled again, for a
    layer further on: across the border of a sweep too. A failed read surfaces in `acquire`.
    Close it.
    """

    def __init__(
        self,
        pack: Pack,
        model: nn.Module,
        *,
        splits: Sequence[Split],
        compute: Tier,
        device: torch.device,
    ) -> None:
        self.counters = WeightCounters()
        self._pack = pack
        self._unchecked = set(range(len(splits)))  # layers whose streamed part was never read
        self._device = device
        # The skeleton says in what dtype each parameter computes: some stay in float32.
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._owners = _parameter_owners(model)
        layers, outer = split_groups(pack.groups)
        self._parts = [
            part_layer(group, split, compute) for group, split in zip(layers, splits, strict=True)
        ]
        self._readers = {path: DirectReader(path) for path in {g.path for g in pack.groups}}
        self._hosted = self._load_all(outer)
        self._order = [index for index, parts in enumerate(self._parts) if parts.streamed]
        self._visited: list[int] = []  # streamed layers acquired in this sweep
        self._held: int | None = None
        # Where nothing has to be converted or carried on, layers are computed where they are read to.
        self._in_place = device.type == "cpu" and all(
            tensor.dtype == self._dtypes[tensor.name]
            for parts in self._parts
            for tensor in parts.streamed
        )
        self._views: dict[str, torch.Tensor] = {}
        self._slots = self._make_slots()
        self._copy_stream = _stream(device) if device.type == "cuda" else None
        for index in self._order:
            self._bind_to_slot(index)
        self._filled: queue.Queue[int | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fetch_all, name="freight-weights", daemon=True)
        if self._order:
            self._thread.start()

    # -- the executor's side ---------------------------------------------------------------

    def acquire(self, layer: int) -> None:
        if not self._parts[layer].streamed:
            return
        started_s = time.perf_counter()
        found = self._filled.get()
        self.counters.waited_s += time.perf_counter() - started_s
        if isinstance(found, BaseException):
            self._filled.put(found)  # for whoever asks next: streaming has ended
            raise EngineError(f"weights of layer {layer} cannot be read: {found}") from found
        assert found == layer, f"layers are visited in order: {found} is there, {layer} was asked"
        self._visited.append(layer)
        self._held = layer
        filled = self._slot_of(layer).filled
        if filled is not None:
            torch.cuda.current_stream(self._device).wait_event(filled)

    def release(self, layer: int) -> None:
        if not self._parts[layer].streamed:
            return
        slot = self._slot_of(layer)
        if slot.drained is not None:
            slot.drained.record(torch.cuda.current_stream(self._device))
        self._held = None
        if len(self._visited) == len(self._order):
            self._visited.clear()
        slot.free.release()

    def rewind(self) -> None:
        """After a sweep that broke off: let the rest of its layers pass, so that the next sweep
        finds the first. Reading that has failed stays failed.
        """
        if self._held is not None:
            self.release(self._held)
        with contextlib.suppress(EngineError):
            for layer in self._order[len(self._visited) :] if self._visited else ():
                self.acquire(layer)
                self.release(layer)

    def close(self) -> None:
        self._stop.set()
        for slot in self._slots:
            slot.free.release()
        if self._thread.is_alive():
            self._thread.join()
        if self._copy_stream is not None:
            self._copy_stream.synchronize()  # its last copies write to slots that are freed next
        self._filled.put(EngineError("the weights are closed"))  # for whoever asks all the same
        self._close_readers()

    # -- the fetching side -----------------------------------------------------------------

    def _fetch_all(self) -> None:
        try:
            for layer in self._cycle():
                self._slot_of(layer).free.acquire()
                if self._stop.is_set():
                    return
                started_s = time.perf_counter()
                self._fetch(layer)
                self.counters.fetched_s += time.perf_counter() - started_s
                self._filled.put(layer)
        except BaseException as error:  # noqa: BLE001  # handed over: `acquire` raises it
            self._filled.put(error)

    def _cycle(self) -> Iterator[int]:
        while True:
            yield from self._order

    def _fetch(self, layer: int) -> None:
        """Fill the layer's slot: from disk through the staging buffer, from host memory directly."""
        parts = self._parts[layer]
        slot = self._slot_of(layer)
        if slot.filled is not None:
            slot.filled.synchronize()  # the staging buffer's last copy has left it
        staged = self._read(slot.staging, parts.group, parts.on_disk)
        if layer in self._unchecked:
            check_tensors(self._pack, parts.group, staged)
            self._unchecked.discard(layer)
        sources = {**self._hosted[layer], **staged}
        if self._copy_stream is None:
            if not self._in_place:
                self._copy(sources)
        else:
            assert slot.drained is not None
            assert slot.filled is not None
            with torch.cuda.stream(self._copy_stream):
                self._copy_stream.wait_event(slot.drained)
                self._copy(sources)
                slot.filled.record(self._copy_stream)
        self.counters.streamed_bytes += sum(tensor.num_bytes for tensor in parts.streamed)

    def _copy(self, sources: Mapping[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            for name, source in sources.items():
                self._views[name].copy_(source, non_blocking=True)

    # -- setting up ------------------------------------------------------------------------

    def _slot_of(self, layer: int) -> _Slot:
        # Bound once: with an odd number of streamed layers the first and the last share a slot, and
        # the first one's fetch waits for the last one's compute.
        return self._slots[self._order.index(layer) % NUM_SLOTS]

    def _make_slots(self) -> list[_Slot]:
        if not self._order:
            return []
        computed = max(
            sum(_aligned(self._computed_bytes(tensor)) for tensor in parts.streamed)
            for parts in self._parts
        )
        if self._in_place:
            computed = 0
        staged = max(span_bytes(parts.on_disk) for parts in self._parts)
        return [_Slot(computed, staged, self._device) for _ in range(NUM_SLOTS)]

    def _computed_bytes(self, tensor: PackedTensor) -> int:
        return tensor.num_bytes // tensor.dtype.itemsize * self._dtypes[tensor.name].itemsize

    def _bind_to_slot(self, layer: int) -> None:
        slot, parts = self._slot_of(layer), self._parts[layer]
        if self._in_place:
            views = views_of(slot.staging, parts.group, parts.on_disk)
        else:
            views = self._storage_views(slot.storage, parts.streamed)
        self._views |= views
        for name, view in views.items():
            self._bind(name, view)

    def _storage_views(
        self, storage: torch.Tensor, tensors: tuple[PackedTensor, ...]
    ) -> dict[str, torch.Tensor]:
        offset = 0
        views = {}
        for tensor in tensors:
            num_bytes = self._computed_bytes(tensor)
            raw = storage[offset : offset + num_bytes]
            views[tensor.name] = raw.view(self._dtypes[tensor.name]).view(tensor.shape)
            offset += _aligned(num_bytes)
        return views

    def _load_all(self, outer: Sequence[PackGroup]) -> list[dict[str, torch.Tensor]]:
        """Bind what is resident; by layer, what host memory holds. Raises PackError."""
        try:
            for group in outer:
                self._load_resident(group, group.tensors)
            for parts in self._parts:
                self._load_resident(parts.group, parts.resident)
            return [self._load_hosted(parts) for parts in self._parts]
        except OSError as error:
            self._close_readers()
            raise PackError(f"the weights cannot be loaded: {error}") from error
        except EngineError:
            self._close_readers()
            raise

    def _read(
        self, buffer: HostBuffer, group: PackGroup, tensors: tuple[PackedTensor, ...]
    ) -> dict[str, torch.Tensor]:
        """From whichever file the group lies in."""
        return read_tensors(self._readers[group.path], buffer, group, tensors)

    def _close_readers(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _load_resident(self, group: PackGroup, tensors: tuple[PackedTensor, ...]) -> None:
        for tensor in tensors:
            buffer = HostBuffer(tensor.num_bytes + 2 * PAGE_BYTES, pinned=False)
            found = self._read(buffer, group, (tensor,))
            check_tensors(self._pack, group, found)
            [(name, source)] = found.items()
            self._bind(name, source.to(self._device, self._dtypes[name], copy=True))

    def _load_hosted(self, parts: LayerParts) -> dict[str, torch.Tensor]:
        """The layer's host-memory part, pinned, in stored dtype."""
        if not parts.hosted:
            return {}
        buffer = HostBuffer(span_bytes(parts.hosted) + 2 * PAGE_BYTES, pinned=True)
        found = self._read(buffer, parts.group, parts.hosted)
        check_tensors(self._pack, parts.group, found)
        return found

    def _bind(self, name: str, value: torch.Tensor) -> None:
        for owner, attribute in self._owners[name]:
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))


def _parameter_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """By parameter name, every module attribute that holds it: tied weights have several."""
    by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            by_identity.setdefault(id(parameter), []).append((module, attribute))
    return {name: by_identity[id(parameter)] for name, parameter in model.named_parameters()}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as above
