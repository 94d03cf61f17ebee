"""Which of the processes that share a model this one is."""

from __future__ import annotations

from dataclasses import dataclass

# Calibration samples are summed in at most so many parts: more ranks would have nothing to do.
MOST_RANKS = 16


@dataclass(frozen=True)
class World:
    """rank of size processes on all machines; local_rank of local_size on this one.

    meeting: a file that the ranks of one machine find each other by; "" for torchrun's own variables.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    meeting: str = ""
