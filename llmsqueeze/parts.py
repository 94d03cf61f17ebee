"""Calibration samples in parts that do not depend on how many ranks share them.

A part is measured by itself and added to the sum in its turn, wherever it was measured. Part n belongs to
rank n modulo the ranks, so that all ranks have one to add at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.blocks import cut_batches
from llmsqueeze.numerics.stats import InputStats
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.world import MOST_RANKS as MOST


@dataclass(frozen=True)
class Part:
    """batches: samples of each forward pass; held_out: whether they are."""

    batches: tuple[slice, ...]
    held_out: bool

    @property
    def samples(self) -> list[int]:
        return [sample for rows in self.batches for sample in range(rows.start, rows.stop)]


def cut_parts(tokens: Tensor, batch: int, held_out: int) -> list[Part]:
    """At most MOST parts of tokens, [samples, seqlen], as even as whole batches allow.

    None mixes held-out samples with others.
    """
    batches = cut_batches(tokens, batch, held_out)
    first = sum(rows.start < tokens.shape[0] - held_out for rows in batches)
    kinds = [(batches[:first], False), (batches[first:], True)]
    counts = [len(found) for found, _ in kinds]
    if sum(counts) > MOST:
        last = max(1, round(MOST * counts[1] / sum(counts))) if counts[1] else 0
        counts = [min(counts[0], MOST - last), min(counts[1], last)]
    parts = []
    for (found, held), count in zip(kinds, counts, strict=True):
        cuts = [len(found) * i // count for i in range(count + 1)] if count else []
        parts += [Part(tuple(found[a:b]), held) for a, b in itertools.pairwise(cuts)]
    return parts


@dataclass(frozen=True)
class Split:
    """Parts over ranks. parts: of all ranks; own: this rank's part of every round, None where none is left,
    its batches counted within this rank's own samples; samples: which these are."""

    parts: list[Part]
    own: list[Part | None]
    samples: list[int]
    team: Team = ALONE

    @classmethod
    def of(cls, parts: list[Part], team: Team) -> Split:
        samples: list[int] = []
        own: list[Part | None] = []
        for number in range(team.rank, -(-len(parts) // team.size) * team.size, team.size):
            if number >= len(parts):
                own.append(None)
                continue
            part, first = parts[number], len(samples)
            shift = first - part.samples[0]
            moved = (slice(rows.start + shift, rows.stop + shift) for rows in part.batches)
            own.append(Part(tuple(moved), part.held_out))
            samples += part.samples
        return cls(parts, own, samples, team)

    @property
    def batches(self) -> list[slice]:
        """Of all own parts."""
        return [rows for part in self.own if part for rows in part.batches]


class Pool:
    """The sums of one input group, part by part. new: makes empty ones; like: [any, in], its inputs' dtype.

    For every round: fresh(), which is filled with this rank's part, then add(); then finish(). Of several
    ranks each adds up a slice of the sums until then.
    """

    def __init__(self, split: Split, new: Callable[[], InputStats], like: Tensor) -> None:
        self._split, self._team, self._like = split, split.team, like
        self._part, self._total = new(), new()
        self._needs = self._part.needs
        if any(part.held_out for part in split.parts):
            self._total.held_out = new()
        self._round = 0
        self._probes: list[list[Tensor]] = []
        self._slices: dict[tuple[bool, str], Tensor] = {}

    def fresh(self) -> InputStats:
        """Empty sums for this rank's part of the round."""
        self._part.clear()
        mine = self._split.own[self._round]
        # Where some are held out, only those are probed.
        wanted = mine is not None and (mine.held_out or self._total.held_out is None)
        self._part.needs = self._needs if wanted else self._needs - {"probe"}
        return self._part

    def add(self) -> None:
        """Add the parts of all ranks in this round."""
        team, part = self._team, self._part
        self._probes.append(list(part.probes))
        part.probes = []
        first = self._round * team.size
        targets = [
            [self._total, self._total.held_out] if p.held_out else [self._total]
            for p in self._split.parts[first : first + team.size]
        ]
        self._round += 1
        if team.size == 1:
            for target in targets[0]:
                assert target is not None
                target.merge(part)
            return
        counts = team.gather([part.count, part.samples])
        for name, sums in part.sums().items():
            pieces = team.scatter(sums)
            for rank, into in enumerate(targets):
                for target in into:
                    held = target is not self._total
                    if (held, name) not in self._slices:
                        self._slices[held, name] = torch.zeros_like(pieces[0])
                    self._slices[held, name] += pieces[rank]
        for rank, into in enumerate(targets):
            for target in into:
                assert target is not None
                target.count += counts[rank][0]
                target.samples += counts[rank][1]

    def finish(self) -> InputStats:
        """The sums of all parts, on every rank."""
        total, team = self._total, self._team
        into = total.held_out or total
        if team.size > 1:
            for (held, name), own in sorted(self._slices.items()):
                stats = total.held_out if held else total
                assert stats is not None
                team.collect(own, stats.sums()[name])
            self._slices = {}
            if "probe" in self._needs:
                into.probes = self._collect_probes()
        else:
            into.probes = [rows for found in self._probes for rows in found]
        del self._part
        return total

    def _collect_probes(self) -> list[Tensor]:
        """In the order of the parts."""
        own = [rows for found in self._probes for rows in found]
        lengths = self._team.gather([sum(map(len, found)) for found in self._probes])
        queues = []
        for owner, each in enumerate(lengths):
            rows = self._like.new_empty(sum(each), self._like.shape[1])
            if owner == self._team.rank and own:
                torch.cat(own, out=rows)
            self._team.send(rows, owner)
            queues.append(iter(rows.split(each)))
        return [next(queues[number % len(queues)]) for number in range(len(self._split.parts))]
