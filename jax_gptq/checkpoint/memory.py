"""Gives freed memory back to the operating system while a checkpoint is loaded."""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other C libraries have none and need none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def release_freed_memory() -> None:
    """Return free heap pages to the system.

    Repacking a layer frees tens of megabytes between blocks that stay. glibc keeps such holes, and
    over hundreds of layers they add up to hundreds of megabytes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
