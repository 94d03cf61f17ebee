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

    @property
    def numbered(self) -> list[tuple[int, Part]]:
        """Own parts, each with its number among all."""
        rounds = enumerate(self.own)
        return [(i * self.team.size + self.team.rank, part) for i, part in rounds if part]

    @property
    def calls(self) -> list[slice]:
        """Of all own parts, where there is one; else a batch that shows how blocks are called."""
        return self.batches or list(self.parts[0].batches[:1])

    def own_tokens(self, tokens: Tensor) -> tuple[Tensor, list[int] | None]:
        """`tokens` and `samples` as load_blocks takes them, with `calls` as its batches."""
        if self.team.size == 1:
            return tokens, None
        return (tokens[self.samples] if self.samples else tokens[self.calls[0]]), self.samples


class Pool:
    """The sums of one input group, part by part. new: makes empty ones; like: [any, in], its inputs' dtype.

    For every round: fresh(), which is filled with this rank's part, then add(); then finish(). Of several
    ranks each adds up a slice of the sums until then.
    """

    def __init__(self, split: Split, new: Callable[[], InputStats], like: Tensor) -> None:
        self._split, self._team, self._new, self._like = split, split.team, new, like
        self._part = new()
        self._needs = self._part.needs
        self._held = any(part.held_out for part in split.parts)
        self._total = self._empty() if self._team.size == 1 else None
        self._round = 0
        self._probes: list[list[Tensor]] = []
        self._slices: dict[tuple[bool, str], Tensor] = {}
        self._counts = {False: [0, 0], True: [0, 0]}

    def _empty(self) -> InputStats:
        total = self._new()
        total.held_out = self._new() if self._held else None
        return total

    def fresh(self) -> InputStats:
        """Empty sums for this rank's part of the round."""
        self._part.clear()
        mine = self._split.own[self._round]
        # Where some are held out, only those are probed.
        wanted = mine is not None and mine.held_out == self._held
        self._part.needs = self._needs if wanted else self._needs - {"probe"}
        return self._part

    def add(self) -> None:
        """Add the parts of all ranks in this round."""
        part, size = self._part, self._team.size
        self._probes.append(part.probes)
        part.probes = []
        parts = self._split.parts[self._round * size :][:size]
        self._round += 1
        if self._total is not None:
            self._total.merge(part)
            if parts[0].held_out:
                assert self._total.held_out is not None
                self._total.held_out.merge(part)
            return
        # Each rank's part into the sums of all, and of those held out if it is.
        goals = [(rank, held) for rank, p in enumerate(parts) for held in {False, p.held_out}]
        counts = self._team.gather([part.count, part.samples])
        for rank, held in goals:
            before = self._counts[held]
            self._counts[held] = [a + b for a, b in zip(before, counts[rank], strict=True)]
        for name, sums in part.sums().items():
            pieces = self._team.scatter(sums)
            for rank, held in goals:
                if (held, name) not in self._slices:
                    self._slices[held, name] = torch.zeros_like(pieces[0])
                self._slices[held, name] += pieces[rank]

    def finish(self) -> InputStats:
        """The sums of all parts, on every rank."""
        del self._part
        total = self._total
        if total is not None:
            (total.held_out or total).probes = [rows for found in self._probes for rows in found]
            return total
        total = self._empty()
        for held, stats in ((False, total), (True, total.held_out)):
            if stats is not None:
                stats.count, stats.samples = self._counts[held]
                for name, sums in stats.sums().items():
                    self._team.collect(self._slices.pop((held, name)), sums)
        if "probe" in self._needs:
            (total.held_out or total).probes = self._collect_probes()
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
