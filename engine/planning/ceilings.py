"""The measured ceilings of this machine's links and units, as data; nothing is measured here."""

import dataclasses

from engine.timeline import Track


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Best of a few tries, in bytes/s and FLOP/s; None for a link that nothing crosses."""

    gemm_flops_per_s: float
    memory_bytes_per_s: float
    """Reading, where keys and values lie."""
    disk_read_bytes_per_s: float | None = None
    to_gpu_bytes_per_s: float | None = None

    def of(self, track: Track) -> float | None:
        """The ceiling that bounds `track`, in its own unit, if one was measured."""
        match track:
            case Track.LAYERS | Track.HEAD:
                return self.gemm_flops_per_s
            case Track.ATTENTION:
                return self.memory_bytes_per_s
            case Track.DISK_READ:
                return self.disk_read_bytes_per_s
            case Track.TO_GPU:
                return self.to_gpu_bytes_per_s
            case _:
                return None
