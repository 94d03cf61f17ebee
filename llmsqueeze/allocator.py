"""Memory that is freed goes back to the system, so that a process takes what it holds and little more."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# What is at least so large is mapped by itself. glibc starts lower, but raises that to 32 MB as it goes, and
# keeps what is smaller in a heap of holes: 1045 MB where 844 do (Wanda, 64 × 256 tokens, 6 blocks 512 wide).
# Mapping anew took 8 % more processor time there; it is less the wider a model, as products grow faster.
LARGE = 2**20
_M_MMAP_THRESHOLD = -3


def return_freed() -> None:
    """Let the C library give large freed blocks back at once. Only glibc does otherwise."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def trim() -> None:
    """Give back what lies free in heaps now, after many small blocks."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
