"""kv_attend on CUDA: which variant of its kernel runs, and how it is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics.kv_tiles import FP8, TileFormat
from llmsqueeze.ops import cuda
from llmsqueeze.ops.operands import half

_LOG2_E = 1.4426950408889634
# Warps of a block, stages of their rings, copies of the table of pairs; the best first, what fits is taken.
_SHAPES = (
    (8, 4, 32), (8, 3, 32), (8, 2, 32), (4, 3, 32), (8, 2, 8), (4, 3, 8), (4, 2, 8), (2, 2, 8),
)  # fmt: skip
# Constants of channels that a lane can hold: beyond this width they stay in shared memory.
_HELD = 128


def kv_attend(
    q: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None, books: Tensor | None,
    channels: Tensor | None, inverse: Tensor | None, angles: Tensor | None, steps: Tensor | None,
    key_sinks: Tensor | None, value_sinks: Tensor | None, counters: Tensor, format: list[int],
    window: int, scale: float,
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
    if counters.numel() < batch * kv_heads or (steps is not None and len(steps) < capacity):
        raise EnvironmentFault("kv_attend: too few counters, or angles for too few positions")
    device = q.device.index
    macros = variant(form, group, cuda.most_shared(device)) | {
        "HALF": half(q), "PDL": int(cuda.is_hopper(device)),
    }  # fmt: skip
    # One block to a multiprocessor, and a tile or more for every warp.
    most = cuda.architecture(device)[1] // (batch * kv_heads)
    splits = max(1, min(most, -(-capacity // macros["WARPS"])))
    y = q.new_empty(batch, 1, heads, width)
    partial = None
    if splits > 1:
        size = batch * kv_heads * splits * group * (width + 2)
        partial = q.new_empty(size, dtype=torch.float32)
    sinks = 0 if key_sinks is None else key_sinks.shape[2]
    cuda.launch(
        "kv_attend", macros, q,
        (q.contiguous(), tiles, length, padding, books, channels, inverse, angles, steps, key_sinks,
         value_sinks, y, partial, counters, scale * _LOG2_E, capacity, kv_heads, sinks, window),
        grid=(splits, batch * kv_heads), block=32 * macros["WARPS"],
        shared=shared_bytes(form, group, macros),
    )  # fmt: skip
    return y


def variant(form: TileFormat, group: int, shared: int) -> dict[str, int]:
    """Macros of the kernel for a format, where a block may have so much shared memory."""
    macros = {
        "D": form.width, "GROUP": group, "BITS": form.bits, "CHANNELS": int(not form.key_scale),
        "OFFSETS": int(form.value_offset), "KEY_SLOTS": form.key_slots,
        "VALUE_SLOTS": form.value_slots, "TURN_KEYS": int(form.turned_keys),
        "TURN_VALUES": int(form.turned_values), "ROTARY": form.rotary,
        "HELD": int(not form.key_scale and form.width <= _HELD),
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
    sparse = warps * 32 * width if form.key_slots or form.value_slots else 0
    constants = 96 * width if channels and not macros["HELD"] else 0
    inverse = 4 * width if form.key_slots else 0
    queries = 4 * group * (width + 8)
    sinks = 4 * group * (width + 2)
    return front + sparse + constants + inverse + queries + sinks + 8 * warps * stages
