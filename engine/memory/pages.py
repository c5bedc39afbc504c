"""Pages of a pool, handed out in contiguous runs: bookkeeping only, no bytes."""

import bisect
import dataclasses

from engine.planning.cost import KV_PAGE_TOKENS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """Contiguous pages; `slot` is the first token's place in the pool."""

    first_page: int
    num_pages: int

    @property
    def slot(self) -> int:
        return self.first_page * KV_PAGE_TOKENS

    @property
    def num_tokens(self) -> int:
        return self.num_pages * KV_PAGE_TOKENS

    def cut(self, num_pages: int) -> tuple["PageRun", "PageRun"]:
        """The first `num_pages` and the rest, as runs of their own."""
        assert 0 < num_pages < self.num_pages, f"{num_pages} of {self.num_pages} pages cut off"
        return (
            PageRun(first_page=self.first_page, num_pages=num_pages),
            PageRun(first_page=self.first_page + num_pages, num_pages=self.num_pages - num_pages),
        )


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // KV_PAGE_TOKENS)


class PageAllocator:
    """First-fit runs of pages, free neighbours merged."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [(0, num_pages)] if num_pages else []

    @property
    def num_free_pages(self) -> int:
        return sum(num_pages for _, num_pages in self._free)

    def allocate(self, num_pages: int) -> PageRun | None:
        for index, (first, available) in enumerate(self._free):
            if available >= num_pages:
                rest = (first + num_pages, available - num_pages)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return PageRun(first_page=first, num_pages=num_pages)
        return None

    def allocate_last(self, num_pages: int) -> PageRun | None:
        """From the pool's end: for runs that stay while others come and go."""
        for index in range(len(self._free) - 1, -1, -1):
            first, available = self._free[index]
            if available >= num_pages:
                rest = (first, available - num_pages)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return PageRun(first_page=first + rest[1], num_pages=num_pages)
        return None

    def release(self, run: PageRun) -> None:
        first, num_pages = run.first_page, run.num_pages
        index = bisect.bisect(self._free, (first, 0))
        before = sum(self._free[index - 1]) if index else 0
        after = self._free[index][0] if index < len(self._free) else self.num_pages
        assert before <= first <= after - num_pages, "pages released twice"
        if index < len(self._free) and after == first + num_pages:
            num_pages += self._free.pop(index)[1]
        if index and before == first:
            index -= 1
            first, before_pages = self._free.pop(index)
            num_pages += before_pages
        self._free.insert(index, (first, num_pages))

    def regrow(self, run: PageRun, num_pages: int) -> PageRun | None:
        """Give `run` back for a larger one that may overlap it; None leaves it as it was."""
        free = list(self._free)
        self.release(run)
        larger = self.allocate(num_pages)
        if larger is None:
            self._free = free
        return larger
