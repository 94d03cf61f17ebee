"""Decoder blocks one at a time, each with the calibration activations that enter it.

How a model calls its blocks (masks, rotary tables, positions, per-layer differences) is recorded
from the model's own forward, so no architecture's call is re-implemented here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.checkpoint import Checkpoint, place
from llmsqueeze.device import beside
from llmsqueeze.errors import CalibrationError, CheckpointError
from llmsqueeze.experts import call_all
from llmsqueeze.parking import ON_DEVICE, Parked, Parking
from llmsqueeze.streams import Stream

# Tokens per forward pass: enough to amortise reading the weights, few enough to stay in cache.
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
# What is no larger is copied when it is read: while one tensor of a file is held, so are all pages that were
# read with it, and norms wait for their shard while the block's weights were compressed long ago.
SMALL = 2**20


# How one block is called: positional arguments after the hidden states, keyword arguments.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def batch_samples(seqlen: int, device: torch.device) -> int:
    """Samples per forward pass that suit the device."""
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    return max(1, tokens // seqlen)


def cut_batches(tokens: Tensor, batch: int, held_out: int) -> list[slice]:
    """Samples of every forward pass; none of them mixes held-out samples with others."""
    samples = tokens.shape[0]
    cut = samples - held_out
    first = [slice(start, min(start + batch, cut)) for start in range(0, cut, batch)]
    return first + [slice(at, min(at + batch, samples)) for at in range(cut, samples, batch)]


@dataclass(frozen=True)
class Run:
    """How to run one block over the calibration activations. last: its output is not needed."""

    block: nn.Module
    hidden: Tensor | Parked
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


@dataclass(frozen=True)
class Boundary:
    """Between two blocks: where a walk can be taken up again.

    done: the blocks before it. activations: what enters the next block, [samples, seqlen, hidden] each, of
    the walk and of the twin if there is one. They are overwritten as the walk goes on; none after the last.
    samples: which ones these are, None for all, in order; others: what other ranks have.
    """

    done: int = 0
    activations: tuple[Tensor | Parked, ...] = ()
    samples: tuple[int, ...] | None = None
    others: tuple[Boundary, ...] = ()

    def restore(self, hidden: list[Tensor | Parked], samples: list[int]) -> None:
        """Put the activations of these samples, one tensor each of the walk and of a twin, in place.

        CheckpointError where those of some are missing.
        """
        missing = set(samples)
        pieces = [piece for piece in (self, *self.others) if piece.activations]
        for piece in pieces:
            known = range(len(piece.activations[0])) if piece.samples is None else piece.samples
            place = {sample: i for i, sample in enumerate(known)}
            missing -= place.keys()
            for ours, kept in zip(hidden, piece.activations, strict=False):
                found = kept.cpu()  # where a state has them: mapped, so one sample at a time
                for i, sample in enumerate(samples):
                    if sample in place:
                        ours[i] = found[place[sample]]
        if pieces and missing:
            raise CheckpointError(
                f"the state lacks what sample {min(missing)} came to; pass --resume never to start anew"
            )


BEGINNING = Boundary()


@dataclass(frozen=True)
class LoadedBlock:
    """One decoder block with its weights on the compute device.

    prefix: of its full names, with the last dot; tensors: its parameters by full name in stored dtype;
    linears: by name within the block; run: over the calibration activations, None without tokens;
    twin: the same block over activations of its own, if asked for; samples: see load_blocks.
    """

    index: int
    prefix: str
    tensors: dict[str, Tensor]
    linears: dict[str, nn.Linear]
    model: nn.Module
    run: Run | None
    twin: Run | None
    samples: list[int] | None = None

    @property
    def after(self) -> Boundary:
        """The boundary behind this block, once the activations are those of the next."""
        runs = [run for run in (self.run, self.twin) if run and not run.last]
        if self.samples is None:
            return Boundary(self.index + 1, tuple(run.hidden for run in runs))
        if not self.samples:  # a rank that has none of its own; see load_blocks
            runs = []
        return Boundary(self.index + 1, tuple(run.hidden for run in runs), tuple(self.samples))


@torch.no_grad()
def load_blocks(
    checkpoint: Checkpoint,
    tokens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    batches: list[slice],
    *,
    twin: bool = False,
    start: Boundary = BEGINNING,
    samples: list[int] | None = None,
    parking: Parking = ON_DEVICE,
) -> Iterator[LoadedBlock]:
    """Every block in turn, freed when the next is asked for. The caller propagates the activations.

    start: the boundary to go on from. samples: which of all samples `tokens` are, None for all of them; empty
    where they are some that only show how blocks are called. parking: where activations wait.
    """
    if start.done == checkpoint.block_count:
        return
    model = checkpoint.build(dtype)
    call_all(model)  # batches are to meet the same linears in the same order
    hidden, calls = None, None
    if tokens is not None:
        hidden, calls = _embed(checkpoint, model, tokens, dtype, device, batches, parking)
    dense_hidden = hidden.clone() if hidden is not None and twin else None
    if hidden is not None:
        both = [hidden] if dense_hidden is None else [hidden, dense_hidden]
        start.restore(both, list(range(len(hidden))) if samples is None else samples)
    blocks = list(model.get_submodule(checkpoint.blocks_path))
    reading = _read_ahead(checkpoint, device, start.done)
    for index, (block, read) in enumerate(
        zip(blocks[start.done :], reading, strict=True), start.done
    ):
        # Taken out one by one: what is compressed is to hold no page of the source any more.
        tensors = {n: read.pop(n).to(device) for n in list(read)}
        prefix = f"{checkpoint.blocks_path}.{index}."
        linears = {n.removeprefix(prefix): m for n, m in checkpoint.linears(index, model).items()}
        run, other = None, None
        if hidden is not None and calls is not None:
            place(model, tensors, dtype, device)
            move_buffers(block, device)
            last = index + 1 == checkpoint.block_count
            run = Run(block, hidden, calls[index], last)
            if dense_hidden is not None:
                other = Run(copy.deepcopy(block), dense_hidden, calls[index], last)
        yield LoadedBlock(index, prefix, tensors, linears, model, run, other, samples)
        if calls is not None:
            calls[index] = {}
        block.to("meta")


def _read_ahead(
    checkpoint: Checkpoint, device: torch.device, start: int
) -> Iterator[dict[str, Tensor]]:
    """Each block's parameters on the CPU, the next block being read while one is worked on."""

    def read(names: list[str]) -> dict[str, Tensor]:
        found = checkpoint.read(names)
        return {n: t.clone() if t.nbytes <= SMALL else t for n, t in found.items()}

    names = [checkpoint.block_parameters(index) for index in range(start, checkpoint.block_count)]
    with beside(device) as reader:
        upcoming = reader.submit(read, names[0])
        for following in names[1:]:
            block = upcoming.result()
            upcoming = reader.submit(read, following)
            yield block
        yield upcoming.result()


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the real buffers of a skeleton; its parameters stay where they are."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


def _embed(
    checkpoint: Checkpoint,
    model: Any,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    batches: list[slice],
    parking: Parking,
) -> tuple[Tensor | Parked, list[dict[int, _Call]]]:
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
    hidden: Tensor | Parked | None = None

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal hidden
            size = hidden_states.shape[0]
            if index == 0:
                if hidden is None:
                    shape = (tokens.shape[0], *hidden_states.shape[1:])
                    hidden = parking.new(shape, dtype, device)
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


class _Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


def find_groups(run: Run, rows: slice, linears: dict[str, nn.Linear]) -> list[list[str]]:
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
