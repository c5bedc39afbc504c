"""Where the hidden states of waiting micro-batches lie between two layers."""

import tempfile
from pathlib import Path
from typing import Protocol

import torch

from engine.errors import EngineError
from engine.planning.policy import Tier


class Hidden(Protocol):
    """One forward's hidden states while it waits for its next turn."""

    def put(self, states: torch.Tensor) -> None:
        """Take them away; `states` itself stays valid to be filled again."""
        ...

    def take(self, states: torch.Tensor) -> None:
        """Fill `states` with what was put."""
        ...

    def close(self) -> None: ...


class OnCpu:
    """In host memory, beside a GPU. Each way is waited for."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None

    def put(self, states: torch.Tensor) -> None:
        # Waits for the copy: the storage is given up the next moment.
        self._kept = states.to("cpu", copy=True)
        states.untyped_storage().resize_(0)

    def take(self, states: torch.Tensor) -> None:
        assert self._kept is not None, "nothing was put"
        states.untyped_storage().resize_(self._kept.nbytes)
        states.copy_(self._kept)
        self._kept = None

    def close(self) -> None:
        self._kept = None


class OnDisk:
    """In a nameless file of the spill folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this

    def put(self, states: torch.Tensor) -> None:
        # A copy: a storage that numpy has seen can no longer be resized.
        values = states.to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
        self._file.seek(0)
        self._file.write(values.numpy().data)
        self._file.flush()
        states.untyped_storage().resize_(0)

    def take(self, states: torch.Tensor) -> None:
        num_bytes = states.numel() * states.itemsize
        raw = torch.empty(num_bytes, dtype=torch.uint8)
        self._file.seek(0)
        got = self._file.readinto(raw.numpy().data)
        if got != num_bytes:
            raise EngineError(f"hidden states on disk: {num_bytes} bytes wanted, {got} came back")
        states.untyped_storage().resize_(num_bytes)
        states.copy_(raw.view(states.dtype).view(states.shape))

    def close(self) -> None:
        self._file.close()


def may_leave(states: torch.Tensor) -> bool:
    """Whether nothing else lies in their storage, which is given up while they are away."""
    is_whole = states.untyped_storage().nbytes() == states.numel() * states.itemsize
    return is_whole and states.is_contiguous()


def hidden_on(tier: Tier, *, compute: Tier, spill_dir: Path) -> Hidden | None:
    """None where they just stay on the compute tier."""
    if tier is compute:
        return None
    return OnDisk(spill_dir) if tier is Tier.DISK else OnCpu()
