"""What the C library does with memory that was given back: knows no tensors and no budgets."""

import ctypes
import functools
from typing import Any, Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Names that `mallopt` goes by, from glibc's malloc.h."""

_LARGEST_KEPT_BYTES: Final = 32 * 2**20
"""The largest block that glibc lets come from its heap: `HEAP_MAX_SIZE / 2` on 64 bits."""

_KEPT_BYTES: Final = 2**30


def keep_freed_memory() -> None:
    """From now on what is freed stays with this process, for whoever asks next.

    Every layer asks for the same large temporaries again: products, and copies that kernels make of
    weights. Left to itself glibc may hand each back to the kernel and get it anew, zeroed, page by
    page, which can take as long as the products do. Peaks stay what they were. Another C library is
    left as it is.
    """
    if _libc() is not None:
        # Both: setting either of them turns off how glibc adapts the other.
        _libc().mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        _libc().mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def give_freed_memory_back() -> None:
    """What is free now goes to the kernel: after a phase that is not to come again."""
    if _libc() is not None:
        _libc().malloc_trim(0)


@functools.cache
def _libc() -> Any:
    """None where it is not glibc."""
    library = ctypes.CDLL(None)
    has_both = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    return library if has_both else None
