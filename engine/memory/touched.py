"""Checks the mebibytes of a tensor that parts of it were read from: each once, at the first touch.

For parts that come in any order and share mebibytes: rows of a table, experts of a stack.
"""

from collections.abc import Set as AbstractSet

from engine.memory.checksums import CHUNK_BYTES
from engine.memory.manifest import Pack, PackedTensor, PackGroup
from engine.memory.pack import RangeChecker
from engine.memory.source import read_bytes
from engine.timeline import Timeline, Track


class TouchedChunks:
    """Of one tensor of a pack. `check` may be called by several threads."""

    def __init__(
        self, pack: Pack, group: PackGroup, tensor: PackedTensor, timeline: Timeline
    ) -> None:
        self._pack = pack
        self._group = group
        self._tensor = tensor
        self._timeline = timeline
        self._checked: set[int] = set()

    def unchecked(self, first_byte: int, last_byte: int) -> AbstractSet[int]:
        """Chunks of the tensor's bytes, both ends included, that were not checked before."""
        touched = range(first_byte // CHUNK_BYTES, last_byte // CHUNK_BYTES + 1)
        return set(touched) - self._checked

    def check_borders(self, first_byte: int, last_byte: int) -> None:
        """Check the chunks that reach beyond the range, if nobody has; raises what `check` does.

        Those that lie wholly in it are for whoever has read it to check.
        """
        last_of_all = self._tensor.num_bytes - 1
        for chunk in sorted({first_byte // CHUNK_BYTES, last_byte // CHUNK_BYTES} - self._checked):
            start = chunk * CHUNK_BYTES
            end = min(start + CHUNK_BYTES - 1, last_of_all)
            if start < first_byte or end > last_byte:
                self.check(chunk)

    def check(self, chunk: int) -> None:
        """Read all of it and compare. Raises OSError, PackError, CheckpointError."""
        start = chunk * CHUNK_BYTES
        num_bytes = min(CHUNK_BYTES, self._tensor.num_bytes - start)
        name = f"{self._tensor.name}, checked"
        with self._timeline.span(Track.LOADING, name, num_bytes=num_bytes):
            at = self._group.offset_bytes + self._tensor.offset_bytes + start
            data = read_bytes(self._group.path, at, num_bytes)
        RangeChecker(self._pack).check(self._group, self._tensor, start, data)
        self._checked.add(chunk)
