"""The block loop: capture statistics, let the caller compress, propagate what was compressed.

How a model calls its blocks (masks, rotary tables, positions, per-layer differences) is recorded
from the model's own forward, so no architecture's call is re-implemented here. Hooks live only in
this file.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from llmsqueeze.checkpoint import Checkpoint, place
from llmsqueeze.device import beside
from llmsqueeze.errors import CalibrationError
from llmsqueeze.numerics.stats import InputStats

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
) -> Iterator[BlockStep]:
    """For each block: load, gather `needs`, yield to the caller, propagate, free.

    tokens: [samples, seqlen] int64, or None when no statistics are needed. dtype: of the
    computation. batch: samples per pass, 0 for what suits the device.

    order "group": each input group is measured after the groups before it were compressed, so one
    forward pass is enough; every sample's activations inside the block are held at once.
    order "block": all groups are measured on the uncompressed block, then a second pass propagates;
    only one batch's activations are held. This is what the papers' code does.

    Raises CalibrationError naming the site when activations are not finite.
    """
    measuring = bool(needs) and tokens is not None
    model = checkpoint.build(dtype)
    hidden, calls = None, None
    groups_of: dict[tuple[str, ...], list[list[str]]] = {}
    if measuring:
        assert tokens is not None
        batch = batch or batch_samples(tokens.shape[1], device)
        hidden, calls = _embed(checkpoint, model, tokens, dtype, device, batch)
    blocks = model.get_submodule(checkpoint.blocks_path)
    for index, (block, read) in enumerate(
        zip(blocks, _read_ahead(checkpoint, device), strict=True)
    ):
        tensors = {n: t.to(device) for n, t in read.items()}
        linears = {name: model.get_submodule(name) for name in checkpoint.linears(index)}
        if hidden is None or calls is None:
            sites = (Site(name, tensors[f"{name}.weight"], None) for name in linears)
            yield BlockStep(index, tensors, sites, None)
            continue
        place(model, tensors, dtype, device)
        move_buffers(block, device)
        run = _Run(block, hidden, calls[index], batch, last=index + 1 == checkpoint.block_count)
        # Blocks with the same linears group them alike: one block of each kind is probed.
        prefix = f"{checkpoint.blocks_path}.{index}."
        kind = tuple(name.removeprefix(prefix) for name in linears)
        if kind not in groups_of:
            found = find_groups(run, linears)
            groups_of[kind] = [[name.removeprefix(prefix) for name in names] for names in found]
        groups = [[prefix + name for name in names] for names in groups_of[kind]]
        measured = (_one_pass if order == "group" else _two_passes)(run, linears, groups, needs)
        yield BlockStep(index, tensors, _sites(measured, tensors), model)
        for _ in measured:
            raise RuntimeError(f"block {index}: the caller left sites behind")
        calls[index] = {}
        block.to("meta")


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
    batch: int,
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
                hidden[start : start + size] = hidden_states
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
        for start in range(0, tokens.shape[0], batch):
            with contextlib.suppress(_Stop):
                model(tokens[start : start + batch].to(device), use_cache=False)
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
    batch: int
    last: bool

    @property
    def starts(self) -> range:
        return range(0, self.hidden.shape[0], self.batch)

    def forward(self, start: int) -> Tensor:
        """The block's output for the batch that begins at sample `start`."""
        x = self.hidden[start : start + self.batch]
        args, kwargs = self.calls[x.shape[0]]
        out = self.block(x, *args, **kwargs)
        # Blocks return a bare tensor in transformers 5; indexing that would drop the batch.
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def propagate(self, start: int) -> None:
        """Replace that batch's inputs by the outputs, in place."""
        self.hidden[start : start + self.batch] = self.forward(start)


# Site names of one input group with their statistics.
_Measured = tuple[list[str], InputStats]


def _sites(measured: Iterator[_Measured], tensors: dict[str, Tensor]) -> Iterator[Site]:
    for names, stats in measured:
        if not stats.is_finite():
            raise CalibrationError(
                f"activations entering {names[0]} are NaN or Inf; try --dtype float32, or check "
                "the checkpoint with `llmsqueeze eval`"
            )
        for name in names:
            yield Site(name, tensors[f"{name}.weight"], stats)


def find_groups(run: _Run, linears: dict[str, nn.Linear]) -> list[list[str]]:
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

    with _hooked(linears, hook):
        run.forward(0)
    missing = set(linears) - {name for names in groups for name in names}
    if missing:
        raise CalibrationError(
            f"{min(missing)} took no part in the forward pass; its architecture is not supported"
        )
    return groups


@torch.no_grad()
def _two_passes(
    run: _Run, linears: dict[str, nn.Linear], groups: list[list[str]], needs: frozenset[str]
) -> Iterator[_Measured]:
    """Measure every group on the uncompressed block, yield them, then propagate."""
    stats = {names[0]: _new_stats(linears, names, needs) for names in groups}

    def hook(leader: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            stats[leader].update(args[0])
            if leader == groups[-1][0]:
                raise _Stop  # what follows would be computed for nothing

        return gather

    with _hooked({names[0]: linears[names[0]] for names in groups}, hook):
        for start in run.starts:
            with contextlib.suppress(_Stop):
                run.forward(start)
    for names in groups:
        yield names, stats[names[0]]
    if not run.last:
        for start in run.starts:
            run.propagate(start)


@torch.no_grad()
def _one_pass(
    run: _Run, linears: dict[str, nn.Linear], groups: list[list[str]], needs: frozenset[str]
) -> Iterator[_Measured]:
    """Advance every batch to the next group, yield the group to be compressed, go on from there.

    Each batch's forward is a coroutine that pauses inside the block, in the hook of a group's first
    linear: this needs no knowledge of how the block is written.
    """
    current: InputStats
    main = greenlet.getcurrent()

    def hook(leader: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            current.update(args[0])
            main.switch(leader)

        return gather

    batches = [greenlet.greenlet(functools.partial(run.propagate, start)) for start in run.starts]
    try:
        with _hooked({names[0]: linears[names[0]] for names in groups}, hook):
            for names in groups:
                current = _new_stats(linears, names, needs)
                for batch in batches:
                    if batch.switch() != names[0]:
                        raise RuntimeError(f"batches reach {names[0]} in different orders")
                yield names, current
                main = greenlet.getcurrent()  # the caller may resume us from elsewhere
            if not run.last:
                for batch in batches:
                    batch.switch()
    finally:
        for batch in batches:
            batch.throw()  # unwinds what is still paused, and nothing else


def _new_stats(
    linears: dict[str, nn.Linear], names: list[str], needs: frozenset[str]
) -> InputStats:
    weight = linears[names[0]].weight
    return InputStats(weight.shape[1], needs, weight.device)


@contextlib.contextmanager
def _hooked(
    linears: dict[str, nn.Linear],
    hook: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None]],
) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
