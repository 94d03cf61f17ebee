"""The block loop: capture statistics, let the caller compress, propagate what was compressed.

Hooks live only in blocks.py and streams.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from llmsqueeze.blocks import (
    BEGINNING,
    Boundary,
    Run,
    batch_samples,
    find_groups,
    load_blocks,
)
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CalibrationError
from llmsqueeze.experts import Expert, expert_of
from llmsqueeze.numerics.stats import InputStats
from llmsqueeze.parking import ON_DEVICE, Parking
from llmsqueeze.parts import Pool, Split, cut_parts
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.streams import Stream, pausing


@dataclass(frozen=True)
class Site:
    """A linear of the current block. weight: [out, in] as stored; stats: None if none were asked, and of the
    tokens that a router sends there if the linear is one of an expert's."""

    name: str
    weight: Tensor
    stats: InputStats | None
    routed: bool = False


class BlockStep:
    """One block for the caller to compress before the walk goes on.

    index; tensors: every parameter of the block by full name, in stored dtype on the compute device;
    groups: the linears that can be compressed at one time, as soon as their statistics are complete. Take
    them all, in order. after: the boundary behind the block, once all were taken.
    """

    def __init__(
        self,
        index: int,
        tensors: dict[str, Tensor],
        groups: Iterator[list[Site]],
        model: nn.Module | None,
        after: Boundary,
    ) -> None:
        self.index = index
        self.tensors = tensors
        self.groups = groups
        self.after = after
        self._model = model

    @property
    def sites(self) -> Iterator[Site]:
        """The linears of all groups, one by one."""
        return itertools.chain.from_iterable(self.groups)

    def replace(self, site: Site, weight: Tensor) -> None:
        """Set the compressed weight: what is stored, and what everything after it is fed by."""
        name = f"{site.name}.weight"
        self.tensors[name] = weight
        if self._model is not None:
            self._model.get_parameter(name).data.copy_(weight)


@torch.no_grad()
def walk(
    checkpoint: Checkpoint,
    tokens: Tensor | None,
    needs: frozenset[str],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 0,
    order: str = "group",
    *,
    sites: Set[str] | None = None,
    dense_share: float = 0.0,
    held_out: int = 0,
    start: Boundary = BEGINNING,
    team: Team = ALONE,
    parking: Parking = ON_DEVICE,
) -> Iterator[BlockStep]:
    """For each block: load, gather `needs`, yield to the caller, propagate, free.

    tokens: [samples, seqlen] int64, or None when no statistics are needed. dtype: of the
    computation. batch: samples per pass, 0 for what suits the device. sites: linears that are asked for; of
    none of a group, it is not measured, and does not come up. held_out: the last so many
    samples are summed apart too (InputStats.held_out). dense_share: see InputStats. start: the boundary to go
    on from. team: the ranks that share the samples; all get all sums, and must set the same weights. parking:
    where activations wait between blocks.

    order "group": each input group is measured after the groups before it were compressed, so one
    forward pass is enough; every sample's activations inside the block are held at once.
    order "block": all groups are measured on the uncompressed block, then a second pass propagates;
    only one batch's activations are held. This is what the papers' code does.

    Linears of experts see the tokens that the block as it is by then sends to them, maybe none.

    Raises CalibrationError naming the site when activations are not finite.
    """
    if not needs:
        tokens = None
    split, batches, samples = Split([], [], []), list[slice](), None
    if tokens is not None:
        batch = batch or batch_samples(tokens.shape[1], device)
        split = Split.of(cut_parts(tokens, batch, held_out), team)
        batches = split.calls
        tokens, samples = split.own_tokens(tokens)
    groups_of: dict[tuple[str, ...], list[list[str]]] = {}
    following = bool(dense_share)
    for loaded in load_blocks(
        checkpoint,
        tokens,
        dtype,
        device,
        batches,
        twin=following,
        start=start,
        samples=samples,
        parking=parking,
    ):
        prefix, tensors, run = loaded.prefix, loaded.tensors, loaded.run
        if run is None:
            plain = (Site(prefix + n, tensors[f"{prefix}{n}.weight"], None) for n in loaded.linears)
            yield BlockStep(loaded.index, tensors, iter([list(plain)]), None, loaded.after)
            continue
        # Blocks with the same linears group them alike: one block of each kind is probed.
        kind = tuple(loaded.linears)
        if kind not in groups_of:
            groups_of[kind] = find_groups(run, batches[0], loaded.linears)
        measure = _Measure(
            run=run,
            dense=loaded.twin,
            split=split,
            groups=_asked(groups_of[kind], prefix, sites),
            residuals=checkpoint.residuals,
            needs=needs,
            dense_share=dense_share,
        )
        measured = measure.one_pass() if order == "group" else measure.two_passes()
        groups = _sites(measured, prefix, tensors, measure.experts)
        yield BlockStep(loaded.index, tensors, groups, loaded.model, loaded.after)
        for _ in measured:
            raise RuntimeError(f"block {loaded.index}: the caller left sites behind")


def _asked(groups: list[list[str]], prefix: str, sites: Set[str] | None) -> list[list[str]]:
    if sites is None:
        return groups
    return [names for names in groups if any(prefix + name in sites for name in names)]


# Site names of input groups with their statistics, of those that are complete at one time.
_Measured = list[tuple[list[str], InputStats]]


def _sites(
    measured: Iterator[_Measured],
    prefix: str,
    tensors: dict[str, Tensor],
    experts: Mapping[str, Expert],
) -> Iterator[list[Site]]:
    for complete in measured:
        sites = []
        for names, stats in complete:
            if not stats.is_finite():
                raise CalibrationError(
                    f"activations entering {prefix}{names[0]} are NaN or Inf; try --dtype float32, or "
                    "check the checkpoint with `llmsqueeze eval`"
                )
            for name in names:
                weight = tensors[f"{prefix}{name}.weight"]
                sites.append(Site(prefix + name, weight, stats, name in experts))
            del stats
        complete.clear()  # whoever takes the sites lets go of their statistics
        yield sites


@dataclass(frozen=True)
class _Measure:
    """How the groups of one block are measured. Names are those within the block.

    run, dense: the block as it is being compressed, and its uncompressed twin if one is followed.
    """

    run: Run
    dense: Run | None
    split: Split
    groups: list[list[str]]
    residuals: Mapping[str, str]
    needs: frozenset[str]
    dense_share: float

    @cached_property
    def experts(self) -> dict[str, Expert]:
        """Of `run`, by the linears in them."""
        return _experts(self.run, itertools.chain.from_iterable(self.groups))

    @torch.no_grad()
    def one_pass(self) -> Iterator[_Measured]:
        """Advance every batch to the next group, yield the group to be compressed, go on from there."""
        pairs = {rows.start: self._pair(rows) for rows in self.split.batches}
        try:
            with self._pausing():
                for names in self.groups:
                    yield [(names, self._summed(names, pairs))]
                if not self.run.last:
                    for pair in pairs.values():
                        for stream in pair:
                            stream.advance()
        finally:
            for pair in pairs.values():
                for stream in pair:
                    stream.close()

    @torch.no_grad()
    def two_passes(self) -> Iterator[_Measured]:
        """Measure every group on the uncompressed block, yield them, then propagate."""
        if self.groups:
            yield self._all_summed()
        else:
            self._all_summed()  # the twin goes on
        if not self.run.last:
            for rows in self.split.batches:
                self.run.propagate(rows)

    # What only measuring holds goes with these functions: who compresses has to have room.
    def _summed(self, names: list[str], pairs: dict[int, list[Stream]]) -> InputStats:
        """Of one group, which all batches enter next."""
        pool = self._pool(names)
        for part in self.split.own:
            sums = pool.fresh()
            for rows in part.batches if part else ():
                self._record(sums, names[0], rows, pairs[rows.start])
            pool.add()
        del sums  # of several ranks finish() allocates what takes its place
        return pool.finish()

    def _all_summed(self) -> _Measured:
        pools = {names[0]: self._pool(names) for names in self.groups}
        with self._pausing():
            for part in self.split.own:
                sums = {leader: pool.fresh() for leader, pool in pools.items()}
                for rows in part.batches if part else ():
                    pair = self._pair(rows)
                    for leader in sums:
                        self._record(sums[leader], leader, rows, pair)
                    if self.dense and not self.run.last:
                        # Its output stays what it is; ours has yet to be compressed.
                        pair[1].advance()
                    for stream in pair:
                        stream.close()
                for pool in pools.values():
                    pool.add()
                sums.clear()
        return [(names, pools.pop(names[0]).finish()) for names in self.groups]

    def _pair(self, rows: slice) -> list[Stream]:
        return [run.stream(rows) for run in (self.run, self.dense) if run]

    @contextlib.contextmanager
    def _pausing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for run in (self.run, self.dense):
                if run:
                    leaders = {n[0]: run.block.get_submodule(n[0]) for n in self.groups}
                    residuals = {
                        leader: run.block.get_submodule(self.residuals[leader])
                        for leader in leaders
                        if leader in self.residuals
                    }
                    experts = _experts(run, leaders)
                    stack.enter_context(pausing(leaders, residuals, experts))
            yield

    def _record(self, stats: InputStats, leader: str, rows: slice, pair: list[Stream]) -> None:
        seen = [stream.advance() for stream in pair]
        for entering in seen:
            if entering is None or entering.leader != leader:
                raise RuntimeError(f"batches reach {leader} in different orders")
        ours, dense = seen[0], seen[-1]
        assert ours is not None and dense is not None

        samples, lengths = rows.stop - rows.start, None

        def by_sample(x: Tensor) -> Tensor:
            # OPT flattens samples and tokens on its way to the MLP.
            return x.reshape(samples, -1, x.shape[-1])

        x, dense_x, drift = ours.x, dense.x, None
        if ours.tokens is None or dense.tokens is None:
            x, dense_x = by_sample(x), by_sample(dense_x)
        else:
            dense_x = _in_place_of(x, ours.tokens, dense_x, dense.tokens)
            sample = ours.tokens // self.run.hidden.shape[1]
            lengths = sample.bincount(minlength=samples).tolist()
        if self.dense and ours.residual is not None and dense.residual is not None:
            drift = by_sample(dense.residual - ours.residual)
        stats.update(x, dense_x, drift, lengths)

    def _pool(self, names: list[str]) -> Pool:
        device = self.run.hidden.device
        width = self.run.block.get_submodule(names[0]).weight.shape[1]
        writes = self.dense is not None and names[0] in self.residuals
        drift_width = self.run.hidden.shape[-1] if writes else None

        def new() -> InputStats:
            return InputStats(
                width,
                self.needs,
                device,
                dense_share=self.dense_share if self.dense else 0.0,
                drift_width=drift_width,
            )

        nothing = torch.empty(0, width, dtype=self.run.hidden.dtype, device=device)
        return Pool(self.split, new, nothing)


def _experts(run: Run, linears: Iterable[str]) -> dict[str, Expert]:
    """linear → the expert it is in, of those that are in one."""
    found = {name: expert_of(run.block, name) for name in linears}
    return {name: expert for name, expert in found.items() if expert}


def _in_place_of(x: Tensor, tokens: Tensor, dense_x: Tensor, dense_tokens: Tensor) -> Tensor:
    """[n, in]: what the dense model has in place of each row of x, and x where it sends the token elsewhere.

    tokens: [n], dense_tokens: [m], the tokens that rows are, ascending; dense_x: [m, in].
    """
    if not len(dense_tokens):
        return x
    place = torch.searchsorted(dense_tokens, tokens).clamp_max(len(dense_tokens) - 1)
    both = (dense_tokens[place] == tokens).unsqueeze(1)
    return torch.where(both, dense_x[place], x)
