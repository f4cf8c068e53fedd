"""Memory of the host: arrays that JAX takes over as they are, and giving back what was freed."""

import ctypes
import math
import sys

import numpy as np
from jax.typing import DTypeLike

_ALIGNMENT = 64  # what JAX asks of memory that it is to use as it is


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialised array that `jax.device_put` does not copy on a CPU.

    NumPy asks the system for huge pages (where it has them), JAX does not. A weight is read once
    per token, and from huge pages it comes in faster: `xla_ffi/docs/cpu_notes.md`.
    """
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


def give_back() -> None:
    """Returns freed memory to the system, where the C library would keep it (glibc).

    Its arenas are per thread: what one of XLA's threads has freed is of no use to another.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
