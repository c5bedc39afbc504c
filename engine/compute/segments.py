"""What attention is asked for: which new tokens attend to which slots of a cache, and how scores
become weights. Values only; no arithmetic.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How one layer turns scores into weights."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # (heads,)

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None
