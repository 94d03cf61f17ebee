"""kv_attend on CUDA: which variant of its kernel runs, and how it is launched."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics.kv_tiles import FP8, TOKENS, TileFormat
from llmsqueeze.ops import cuda
from llmsqueeze.ops.operands import half
from llmsqueeze.ops.packed_attention import ring_tiles

_LOG2_E = 1.4426950408889634
# Warps of a block, stages of their rings, copies of the table of pairs; the best first, what fits is taken.
_SHAPES = (
    (8, 3, 32), (8, 2, 32), (4, 3, 32), (8, 2, 8), (4, 3, 8), (4, 2, 8), (2, 2, 8),
)  # fmt: skip
# What a block does before and after its tiles takes as long as so many of a warp.
_START = 8
# Constants of channels that a lane can hold: beyond this width they stay in shared memory.
_HELD = 128
# More tiles than a 32-bit number of tokens can need.
_ENDLESS = (2**31 - 1) // TOKENS


def kv_attend(
    q: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None, books: Tensor | None,
    channels: Tensor | None, inverse: Tensor | None, angles: Tensor | None, steps: Tensor | None,
    key_sinks: Tensor | None, value_sinks: Tensor | None, counters: Tensor, format: list[int],
    window: int, scale: float, skip: float = 0.0,
) -> Tensor:  # fmt: skip
    """EnvironmentFault where there is no kernel: queries not of 16 bits, or more than 8 to a kv head."""
    form = TileFormat.from_arguments(format)
    batch, heads, _, width = q.shape
    kv_heads, capacity = tiles.shape[1:3]
    group = heads // kv_heads
    if group > 8 or q.dtype.itemsize != 2 or not tiles.is_contiguous():
        raise EnvironmentFault(
            f"kv_attend: no kernel for {heads} heads of {q.dtype} over {kv_heads}"
        )
    limit = most_tiles(tiles, angles, window)
    if counters.numel() < batch * kv_heads or (steps is not None and len(steps) < limit):
        raise EnvironmentFault("kv_attend: too few counters, or angles for too few positions")
    device = q.device.index
    macros = variant(form, group, cuda.most_shared(device)) | {
        "HALF": half(q), "PDL": int(cuda.is_hopper(device)), "SLIDING": int(window > 0),
        "SKIP": int(skip > 0),
    }  # fmt: skip
    processors = cuda.architecture(device)[1]
    splits = _splits(batch * kv_heads, -(-capacity // macros["WARPS"]), processors)
    y = q.new_empty(batch, 1, heads, width)
    shared = shared_bytes(form, group, macros)
    if macros["PDL"] and splits * batch * kv_heads <= processors:
        # More than half: of blocks that start early, no two are to share a multiprocessor.
        shared = max(shared, (cuda.most_shared(device) + 4096) // 2)
    partial = None
    if splits > 1:
        size = batch * kv_heads * splits * group * (width + 4)
        partial = q.new_empty(size, dtype=torch.float32)
    sinks = 0 if key_sinks is None else key_sinks.shape[2]
    cuda.launch(
        "kv_attend", macros, q,
        (q.contiguous(), tiles, length, padding, books, channels, inverse, angles, steps, key_sinks,
         value_sinks, y, partial, counters, scale * _LOG2_E, capacity, kv_heads, sinks, window,
         limit, float(skip * _LOG2_E)),
        grid=(splits, batch * kv_heads), block=32 * macros["WARPS"],
        shared=shared,
    )  # fmt: skip
    return y


def most_tiles(tiles: Tensor, angles: Tensor | None, window: int) -> int:
    """That a length may reach. EnvironmentFault where tiles or angles are too few."""
    held = tiles.shape[2]
    turned = _ENDLESS if angles is None else len(angles) - TOKENS
    if turned < held:
        raise EnvironmentFault("angles for fewer positions than tiles hold")
    return turned if window and held >= ring_tiles(window) else held


@functools.cache
def _splits(rows: int, rounds: int, processors: int) -> int:
    """Into how many blocks the tiles of a kv head are divided; rounds: tiles of a warp, were it one block."""
    return min(
        range(1, min(rounds, processors) + 1),
        key=lambda splits: -(-rows * splits // processors) * (_START + -(-rounds // splits)),
    )


def variant(form: TileFormat, group: int, shared: int) -> dict[str, int]:
    """Macros of the kernel for a format, where a block may have so much shared memory."""
    macros = {
        "D": form.width, "GROUP": group, "BITS": form.bits, "CHANNELS": int(not form.key_scale),
        "OFFSETS": int(form.value_offset), "KEY_SLOTS": form.key_slots,
        "VALUE_SLOTS": form.value_slots, "TURN_KEYS": int(form.turned_keys),
        "TURN_VALUES": int(form.turned_values), "ROTARY": form.rotary,
        "HELD": int(not form.key_scale and form.width <= _HELD),
        # Half of a product's columns are free.
        "PAIRED": int(form.value_slots > 0 and group in (1, 2, 4)),
    }  # fmt: skip
    for warps, stages, copies in _SHAPES:
        found = macros | {"WARPS": warps, "STAGES": stages, "COPIES": copies}
        if shared_bytes(form, group, found) <= shared:
            return found
    raise EnvironmentFault(
        f"kv_attend: heads of {form.width} with these outliers do not fit this GPU's shared memory"
    )


def shared_bytes(form: TileFormat, group: int, macros: dict[str, int]) -> int:
    """SHARED of kv_attend.cu; the kernel traps if it is given less."""
    width, warps, stages = form.width, macros["WARPS"], macros["STAGES"]
    channels = not form.key_scale
    table = 0 if form.bits == FP8 else 2048 * macros["COPIES"]
    stage = form.record + (2 * width if channels else 0)
    front = max(table + warps * stages * stage, 4 * warps * group * (width + 4))
    constants = 96 * width if channels and not macros["HELD"] else 0
    columns = 8 if group > 4 or group == 3 else 4 if group == 4 else 2
    outliers = (68 + 4 * columns) * width if form.key_slots else 0
    queries = 4 * group * (width + 8)
    sinks = 4 * group * (width + 4)
    return front + constants + outliers + queries + sinks + 8 * warps * stages
