"""What attention is asked for: which new tokens attend to which slots of a cache, and how scores
become weights. Values only; no arithmetic.
"""

import dataclasses
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Cached tokens of one row that lie side by side: positions from `start` on, slots from `slot`."""

    slot: int
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """New tokens of one row in a micro-batch: `start` in the packing, `past` tokens cached before.

    What the row shares with others lies in the spans of `prefix`, first to last; from there on its
    own cache begins at `slot`. The new tokens always lie in its own.
    """

    start: int
    num_tokens: int
    past: int
    slot: int
    prefix: tuple[Span, ...] = ()

    @property
    def context(self) -> int:
        return self.past + self.num_tokens

    @property
    def own(self) -> Span:
        """All of the row's own tokens, the new ones included."""
        start = self.prefix[-1].end if self.prefix else 0
        return Span(self.slot, start, self.context - start)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (*self.prefix, self.own)

    @property
    def new_slots(self) -> range:
        """Where the new tokens' keys and values go."""
        own = self.own
        first = own.slot + self.past - own.start
        return range(first, first + self.num_tokens)

    def first_visible(self, window: int | None) -> int:
        """The first position that any of the new tokens may see."""
        return 0 if window is None else max(0, self.past + 1 - window)


def cut_at_chunks(segments: Sequence[Segment], chunk_tokens: int) -> list[Segment]:
    """The same tokens as segments that each lie in one chunk of their row and see nothing before
    it: attention in chunks is plain attention over these.
    """
    return [
        _within(segment, chunk, min(chunk + chunk_tokens, segment.context))
        for segment in segments
        for chunk in range(
            segment.past - segment.past % chunk_tokens, segment.context, chunk_tokens
        )
    ]


def _within(segment: Segment, begin: int, end: int) -> Segment:
    """Its new tokens between the two positions, as if the row began at the first of them."""
    own = segment.own
    first = max(begin, segment.past)
    prefix = tuple(
        Span(span.slot + skipped, max(span.start, begin) - begin, span.num_tokens - skipped)
        for span in segment.prefix
        if span.end > begin
        for skipped in [max(0, begin - span.start)]
    )
    return Segment(
        start=segment.start + first - segment.past,
        num_tokens=end - first,
        past=first - begin,
        slot=own.slot + max(0, begin - own.start),
        prefix=prefix,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How one layer turns scores into weights."""

    scaling: float
    window: int | None = None
    chunk_tokens: int | None = None  # each token sees its own chunk of its row only
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # (heads,)

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None
