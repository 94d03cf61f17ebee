"""The block loop: capture statistics, let the caller compress, propagate what was compressed.

How a model calls its blocks (masks, rotary tables, positions, per-layer differences) is recorded
from the model's own forward, so no architecture's call is re-implemented here. Hooks live only in
this file.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.checkpoint import Checkpoint, place
from llmsqueeze.errors import CalibrationError
from llmsqueeze.numerics.stats import InputStats

# Tokens per forward pass. On a CPU small batches stay in cache; a GPU wants to be filled.
CPU_BATCH_TOKENS = 512
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
    """One block, loaded and measured, for the caller to compress before the walk goes on.

    index; tensors: every parameter of the block by full name, in stored dtype on the compute device.
    """

    def __init__(self, index: int, tensors: dict[str, Tensor], sites: list[Site]) -> None:
        self.index = index
        self.tensors = tensors
        self.sites = sites

    def replace(self, site: Site, weight: Tensor) -> None:
        """Set the compressed weight: what is stored, and what later blocks are calibrated on."""
        self.tensors[f"{site.name}.weight"] = weight


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
) -> Iterator[BlockStep]:
    """For each block: load, gather `needs`, yield to the caller, propagate, free.

    tokens: [samples, seqlen] int64, or None when no statistics are needed. dtype: of the
    computation. batch: samples per pass, 0 for what suits the device.
    Statistics of a block are those of the uncompressed block fed by the compressed ones before it.
    Raises CalibrationError naming the site when activations are not finite.
    """
    measuring = bool(needs) and tokens is not None
    hidden, calls = None, None
    if measuring:
        assert tokens is not None
        batch = batch or batch_samples(tokens.shape[1], device)
        hidden, calls = _embed(checkpoint, tokens, dtype, device, batch)
    for index, block in enumerate(checkpoint.blocks):
        names = checkpoint.block_parameters(index)
        tensors = {n: t.to(device) for n, t in checkpoint.read(names).items()}
        linears = checkpoint.linears(index)
        stats: dict[str, InputStats] = {}
        if hidden is not None and calls is not None:
            place(checkpoint.model, tensors, dtype, device)
            move_buffers(block, device)
            stats = _measure(block, linears, hidden, calls[index], batch, needs)
        sites = [Site(name, tensors[f"{name}.weight"], stats.get(name)) for name in linears]
        yield BlockStep(index, tensors, sites)
        if hidden is not None and calls is not None:
            if index + 1 < checkpoint.block_count:
                place(checkpoint.model, tensors, dtype, device)
                _propagate(block, hidden, calls[index], batch)
            calls[index] = {}
            block.to("meta")


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
    checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype, device: torch.device, batch: int
) -> tuple[Tensor, list[dict[int, _Call]]]:
    """Inputs of block 0, [samples, seqlen, hidden], and for every block and batch size its call."""
    model = checkpoint.model
    head = model.get_output_embeddings()
    unused = {id(p) for p in head.parameters()} - {
        id(p) for p in model.get_input_embeddings().parameters()
    }
    names = [n for n in checkpoint.outer_parameters if id(model.get_parameter(n)) not in unused]
    place(model, checkpoint.read(names), dtype, device)
    move_buffers(model, device)
    calls: list[dict[int, _Call]] = [{} for _ in checkpoint.blocks]
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

    for index, block in enumerate(checkpoint.blocks):
        block.forward = recorder(index)  # type: ignore[method-assign]
    try:
        for start in range(0, tokens.shape[0], batch):
            with contextlib.suppress(_Stop):
                model(tokens[start : start + batch].to(device), use_cache=False)
    finally:
        for block in checkpoint.blocks:
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


def _run(block: nn.Module, hidden: Tensor, calls: dict[int, _Call]) -> Tensor:
    args, kwargs = calls[hidden.shape[0]]
    out = block(hidden, *args, **kwargs)
    # Blocks return a bare tensor in transformers 5; indexing it would drop the batch.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _propagate(block: nn.Module, hidden: Tensor, calls: dict[int, _Call], batch: int) -> None:
    """Replace the block's inputs by its outputs, in place."""
    for start in range(0, hidden.shape[0], batch):
        hidden[start : start + batch] = _run(block, hidden[start : start + batch], calls)


def _measure(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: Tensor,
    calls: dict[int, _Call],
    batch: int,
    needs: frozenset[str],
) -> dict[str, InputStats]:
    """Statistics per linear; linears fed by the same tensor share one object.

    The groups are found on the first batch, by identity of the input. Later batches stop as soon as
    the last group was seen: what follows (the last projection) would be computed for nothing.
    """
    group_of: dict[str, InputStats] = {}
    leaders: list[str] = []
    seen: list[tuple[weakref.ref[Tensor], InputStats]] = []
    grouping = True

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if not grouping:
                if name in leaders:
                    group_of[name].update(x)
                    if name == leaders[-1]:
                        raise _Stop
                return
            for reference, stats in seen:
                if reference() is x:
                    group_of[name] = stats
                    return
            stats = InputStats(x.shape[-1], needs, x.device)
            stats.update(x)
            seen.append((weakref.ref(x), stats))
            group_of[name] = stats
            leaders.append(name)

        return gather

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    try:
        for start in range(0, hidden.shape[0], batch):
            with contextlib.suppress(_Stop):
                _run(block, hidden[start : start + batch], calls)
            grouping = False
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if name not in group_of:
            raise CalibrationError(f"{name} took no part in the forward pass; exclude it by --ignore")
        if not group_of[name].is_finite():
            raise CalibrationError(
                f"activations entering {name} are NaN or Inf; try --dtype float32, or check the "
                "checkpoint with `llmsqueeze eval`"
            )
    return group_of
