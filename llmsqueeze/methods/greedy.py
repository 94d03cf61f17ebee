"""Greedy allocation of activation sparsity within a block, after TEAL (arXiv 2408.14690, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# No gate drops more than this.
MOST = 0.95
# Every gate first drops this part of the target: steps from nothing leave whole gates open, since what
# the first inputs cost is too little to be told apart by the block's output.
EVEN = 0.5


@dataclass(frozen=True)
class GreedyStep:
    """The allocation after one step: share of the bytes saved, error, share dropped by every gate."""

    saved: float
    error: float
    sparsity: dict[str, float]


def allocate(
    error: Callable[[Mapping[str, float]], float],
    weight: Mapping[str, float],
    target: float,
    step: float,
) -> list[GreedyStep]:
    """From EVEN · target at every gate, raise one at a time, always the one that costs least.

    error: of the block's output when the gates drop these shares. weight: gate → bytes that it decides
    about. target: the mean of the shares, weighted so, in [0, MOST]. step: share of all bytes that one
    step saves; the last step is shortened to end at the target. The path is empty at target 0.

    Lazily (Minoux 1978): a step tries a gate anew only while its rise when last tried is the least. Exact as
    long as no gate gets cheaper by what others, or itself, drop.
    """
    total = sum(weight.values())
    saved = EVEN * target
    shares = dict.fromkeys(weight, saved)
    path: list[GreedyStep] = []
    reached = error(shares) if target else 0.0
    # What raising a gate cost when it was last tried, and how many steps had been taken by then.
    rises: dict[str, tuple[float, int]] = {}
    while saved < target - 1e-9:
        amount = min(step, target - saved) * total
        if amount < step * total - 1e-9:
            rises = {}  # of whole steps; this one is shorter
        trials = {}
        for name, bytes_ in weight.items():
            raised = shares[name] + amount / bytes_
            if raised <= MOST + 1e-9:
                trials[name] = {**shares, name: min(raised, MOST)}
        if not trials:
            # What is left fits no gate whole: fill the roomiest, at least one has room.
            name = max(shares, key=lambda n: (MOST - shares[n]) * weight[n])
            trials[name] = {**shares, name: MOST}
            rises = {}
        while True:
            best = min(trials, key=lambda name: rises.get(name, (-math.inf, -1))[0])
            rise, tried = rises.get(best, (0.0, -1))
            if tried == len(path):
                break
            rises[best] = error(trials[best]) - reached, len(path)
        shares = trials[best]
        reached += rise
        saved = sum(shares[name] * weight[name] for name in weight) / total
        path.append(GreedyStep(saved, reached, dict(shares)))
    return path
