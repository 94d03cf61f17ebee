"""The block loop: capture statistics, let the caller compress, propagate what was compressed.

How a model calls its blocks (masks, rotary tables, positions, per-layer differences) is recorded
from the model's own forward, so no architecture's call is re-implemented here. Hooks live only in
this file and in streams.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.checkpoint import Checkpoint, place
from llmsqueeze.device import beside
from llmsqueeze.errors import CalibrationError
from llmsqueeze.numerics.stats import InputStats
from llmsqueeze.streams import Stream, pausing

# Tokens per forward pass: enough to amortise reading the weights, few enough to stay in cache.
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384


class _Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


@dataclass(frozen=True)
class Site:
    """A linear of the current block. weight: [out, in] as stored; stats: None if none were asked."""

    name: str
    weight: Tensor
    stats: InputStats | None


class BlockStep:
    """One block for the caller to compress before the walk goes on.

    index; tensors: every parameter of the block by full name, in stored dtype on the compute device;
    sites: the linears, each as soon as its statistics are complete. Take them all, in order.
    """

    def __init__(
        self, index: int, tensors: dict[str, Tensor], sites: Iterator[Site], model: nn.Module | None
    ) -> None:
        self.index = index
        self.tensors = tensors
        self.sites = sites
        self._model = model

    def replace(self, site: Site, weight: Tensor) -> None:
        """Set the compressed weight: what is stored, and what everything after it is fed by."""
        name = f"{site.name}.weight"
        self.tensors[name] = weight
        if self._model is not None:
            self._model.get_parameter(name).data.copy_(weight)


def batch_samples(seqlen: int, device: torch.device) -> int:
    """Samples per forward pass that suit the device."""
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    return max(1, tokens // seqlen)


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
    dense_share: float = 0.0,
    held_out: int = 0,
) -> Iterator[BlockStep]:
    """For each block: load, gather `needs`, yield to the caller, propagate, free.

    tokens: [samples, seqlen] int64, or None when no statistics are needed. dtype: of the
    computation. batch: samples per pass, 0 for what suits the device. held_out: the last so many
    samples are summed apart too (InputStats.held_out). dense_share: see InputStats.

    order "group": each input group is measured after the groups before it were compressed, so one
    forward pass is enough; every sample's activations inside the block are held at once.
    order "block": all groups are measured on the uncompressed block, then a second pass propagates;
    only one batch's activations are held. This is what the papers' code does.

    Raises CalibrationError naming the site when activations are not finite.
    """
    measuring = bool(needs) and tokens is not None
    model = checkpoint.build(dtype)
    hidden, calls = None, None
    batches: list[slice] = []
    groups_of: dict[tuple[str, ...], list[list[str]]] = {}
    if measuring:
        assert tokens is not None
        batches = cut_batches(tokens, batch or batch_samples(tokens.shape[1], device), held_out)
        hidden, calls = _embed(checkpoint, model, tokens, dtype, device, batches)
    dense_hidden = hidden.clone() if hidden is not None and dense_share else None
    blocks = model.get_submodule(checkpoint.blocks_path)
    for index, (block, read) in enumerate(
        zip(blocks, _read_ahead(checkpoint, device), strict=True)
    ):
        tensors = {n: t.to(device) for n, t in read.items()}
        prefix = f"{checkpoint.blocks_path}.{index}."
        linears = {n.removeprefix(prefix): m for n, m in checkpoint.linears(index, model).items()}
        if hidden is None or calls is None:
            sites = (Site(prefix + n, tensors[f"{prefix}{n}.weight"], None) for n in linears)
            yield BlockStep(index, tensors, sites, None)
            continue
        place(model, tensors, dtype, device)
        move_buffers(block, device)
        last = index + 1 == checkpoint.block_count
        run = _Run(block, hidden, calls[index], last)
        # Blocks with the same linears group them alike: one block of each kind is probed.
        kind = tuple(linears)
        if kind not in groups_of:
            groups_of[kind] = find_groups(run, batches[0], linears)
        measure = _Measure(
            run=run,
            dense=None
            if dense_hidden is None
            else _Run(copy.deepcopy(block), dense_hidden, calls[index], last),
            batches=batches,
            groups=groups_of[kind],
            residuals=checkpoint.residuals,
            needs=needs,
            dense_share=dense_share,
            first_held_out=hidden.shape[0] - held_out,
        )
        measured = measure.one_pass() if order == "group" else measure.two_passes()
        yield BlockStep(index, tensors, _sites(measured, prefix, tensors), model)
        for _ in measured:
            raise RuntimeError(f"block {index}: the caller left sites behind")
        calls[index] = {}
        block.to("meta")


def cut_batches(tokens: Tensor, batch: int, held_out: int) -> list[slice]:
    """Samples of every forward pass; none of them mixes held-out samples with others."""
    samples = tokens.shape[0]
    cut = samples - held_out
    first = [slice(start, min(start + batch, cut)) for start in range(0, cut, batch)]
    return first + [slice(at, min(at + batch, samples)) for at in range(cut, samples, batch)]


def _read_ahead(checkpoint: Checkpoint, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Each block's parameters on the CPU, the next block being read while one is worked on."""
    names = [checkpoint.block_parameters(index) for index in range(checkpoint.block_count)]
    with beside(device) as reader:
        upcoming = reader.submit(checkpoint.read, names[0])
        for following in names[1:]:
            block = upcoming.result()
            upcoming = reader.submit(checkpoint.read, following)
            yield block
        yield upcoming.result()


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the real buffers of a skeleton; its parameters stay where they are."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """fp32 products in fp32: TF32 would put its rounding into the statistics."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# How one block is called: positional arguments after the hidden states, keyword arguments.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _embed(
    checkpoint: Checkpoint,
    model: Any,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    batches: list[slice],
) -> tuple[Tensor, list[dict[int, _Call]]]:
    """Inputs of block 0, [samples, seqlen, hidden], and for every block and batch size its call."""
    head = model.get_output_embeddings()
    unused = {id(p) for p in head.parameters()} - {
        id(p) for p in model.get_input_embeddings().parameters()
    }
    names = [n for n in checkpoint.outer_parameters if id(model.get_parameter(n)) not in unused]
    place(model, checkpoint.read(names), dtype, device)
    move_buffers(model, device)
    blocks = model.get_submodule(checkpoint.blocks_path)
    calls: list[dict[int, _Call]] = [{} for _ in blocks]
    hidden: Tensor | None = None

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal hidden
            size = hidden_states.shape[0]
            if index == 0:
                if hidden is None:
                    shape = (tokens.shape[0], *hidden_states.shape[1:])
                    hidden = torch.empty(shape, dtype=dtype, device=device)
                hidden[rows] = hidden_states
            if size in calls[-1]:
                raise _Stop  # every block's call at this batch size is known
            calls[index][size] = (args, kwargs)
            if index + 1 == len(calls):
                raise _Stop
            return hidden_states

        return record

    for index, block in enumerate(blocks):
        block.forward = recorder(index)  # type: ignore[method-assign]
    try:
        for rows in batches:
            with contextlib.suppress(_Stop):
                model(tokens[rows].to(device), use_cache=False)
    finally:
        for block in blocks:
            del block.forward  # the class's own forward shows again
    for name in names:
        place_meta(model, name)
    assert hidden is not None
    return hidden, calls


def place_meta(model: nn.Module, name: str) -> None:
    """Give the memory of a placed parameter back."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False))


@dataclass(frozen=True)
class _Run:
    """How to run one block over the calibration activations. last: its output is not needed."""

    block: nn.Module
    hidden: Tensor
    calls: dict[int, _Call]
    last: bool

    def forward(self, rows: slice) -> Tensor:
        """The block's output for these samples."""
        x = self.hidden[rows]
        args, kwargs = self.calls[x.shape[0]]
        out = self.block(x, *args, **kwargs)
        # Blocks return a bare tensor in transformers 5; indexing that would drop the batch.
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def propagate(self, rows: slice) -> None:
        """Replace those samples' inputs by the outputs, in place."""
        self.hidden[rows] = self.forward(rows)

    def stream(self, rows: slice) -> Stream:
        """propagate() as a coroutine."""
        return Stream(functools.partial(self.propagate, rows))


# Site names of one input group with their statistics.
_Measured = tuple[list[str], InputStats]


def _sites(
    measured: Iterator[_Measured], prefix: str, tensors: dict[str, Tensor]
) -> Iterator[Site]:
    for names, stats in measured:
        if not stats.is_finite():
            raise CalibrationError(
                f"activations entering {prefix}{names[0]} are NaN or Inf; try --dtype float32, or "
                "check the checkpoint with `llmsqueeze eval`"
            )
        for name in names:
            yield Site(prefix + name, tensors[f"{prefix}{name}.weight"], stats)


def find_groups(run: _Run, rows: slice, linears: dict[str, nn.Linear]) -> list[list[str]]:
    """Linears fed by the same tensor, in the order of their first call, found by running one batch."""
    groups: list[list[str]] = []
    seen: list[weakref.ref[Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def group(module: nn.Module, args: tuple[Any, ...]) -> None:
            for reference, names in zip(seen, groups, strict=True):
                if reference() is args[0]:
                    names.append(name)
                    return
            seen.append(weakref.ref(args[0]))
            groups.append([name])

        return group

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    try:
        run.forward(rows)
    finally:
        for handle in handles:
            handle.remove()
    missing = set(linears) - {name for names in groups for name in names}
    if missing:
        raise CalibrationError(
            f"{min(missing)} took no part in the forward pass; its architecture is not supported"
        )
    return groups


@dataclass(frozen=True)
class _Measure:
    """How the groups of one block are measured. Names are those within the block.

    run, dense: the block as it is being compressed, and its uncompressed twin if one is followed.
    """

    run: _Run
    dense: _Run | None
    batches: list[slice]
    groups: list[list[str]]
    residuals: Mapping[str, str]
    needs: frozenset[str]
    dense_share: float
    first_held_out: int

    @torch.no_grad()
    def one_pass(self) -> Iterator[_Measured]:
        """Advance every batch to the next group, yield the group to be compressed, go on from there."""
        pairs = [self._pair(rows) for rows in self.batches]
        try:
            with self._pausing():
                for names in self.groups:
                    stats = self._stats(names)
                    for rows, pair in zip(self.batches, pairs, strict=True):
                        self._record(stats, names[0], rows, pair)
                    yield names, stats
                if not self.run.last:
                    for pair in pairs:
                        for stream in pair:
                            stream.advance()
        finally:
            for pair in pairs:
                for stream in pair:
                    stream.close()

    @torch.no_grad()
    def two_passes(self) -> Iterator[_Measured]:
        """Measure every group on the uncompressed block, yield them, then propagate."""
        stats = {names[0]: self._stats(names) for names in self.groups}
        with self._pausing():
            for rows in self.batches:
                pair = self._pair(rows)
                for names in self.groups:
                    self._record(stats[names[0]], names[0], rows, pair)
                if self.dense and not self.run.last:
                    pair[1].advance()  # its output stays what it is; ours has yet to be compressed
                for stream in pair:
                    stream.close()
        for names in self.groups:
            yield names, stats[names[0]]
        if not self.run.last:
            for rows in self.batches:
                self.run.propagate(rows)

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
                    stack.enter_context(pausing(leaders, residuals))
            yield

    def _record(self, stats: InputStats, leader: str, rows: slice, pair: list[Stream]) -> None:
        seen = [stream.advance() for stream in pair]
        for entering in seen:
            if entering is None or entering.leader != leader:
                raise RuntimeError(f"batches reach {leader} in different orders")
        ours, dense = seen[0], seen[-1]
        assert ours is not None and dense is not None

        def by_sample(x: Tensor) -> Tensor:
            # OPT flattens samples and tokens on its way to the MLP.
            return x.reshape(rows.stop - rows.start, -1, x.shape[-1])

        x, dense_x, drift = by_sample(ours.x), by_sample(dense.x), None
        if self.dense and ours.residual is not None and dense.residual is not None:
            drift = by_sample(dense.residual - ours.residual)
        if stats.held_out is not None and rows.start >= self.first_held_out:
            stats.held_out.update(x, dense_x, drift)
        stats.update(x, dense_x, drift)

    def _stats(self, names: list[str]) -> InputStats:
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

        stats = new()
        if self.first_held_out < self.run.hidden.shape[0]:
            stats.held_out = new()
        return stats
