"""kv_append on CUDA."""

from __future__ import annotations

from torch import Tensor

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics.kv_tiles import TOKENS, TileFormat
from llmsqueeze.ops import cuda
from llmsqueeze.ops.kv_kernels import most_tiles
from llmsqueeze.ops.operands import half

_MOST_HEADS = 64


def kv_append(
    key: Tensor, value: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None,
    books: Tensor | None, offset: Tensor | None, scale: Tensor | None, order: Tensor | None,
    steps: Tensor | None, angles: Tensor | None, key_sinks: Tensor | None, value_sinks: Tensor | None,
    format: list[int], window: int = 0,
) -> None:  # fmt: skip
    """EnvironmentFault where there is no kernel for it. Traps where the tiles are full."""
    form = TileFormat.from_arguments(format)
    batch, kv_heads, count, _ = key.shape
    capacity = tiles.shape[2]
    sinks = 0 if key_sinks is None else key_sinks.shape[2]
    fine = key.dtype.itemsize == 2 and key.dtype == value.dtype and kv_heads <= _MOST_HEADS
    fine &= key_sinks is None or key_sinks.dtype == key.dtype
    if not (fine and tiles.is_contiguous()):
        raise EnvironmentFault(f"kv_append: no kernel for {kv_heads} heads of {key.dtype}")
    limit = most_tiles(tiles, angles, window)
    each = 0 if steps is None else steps.shape[1]
    macros = variant(form) | {"HALF": half(key), "PDL": int(cuda.is_hopper(key.device.index))}
    cuda.launch(
        "kv_append", macros, key,
        (key.contiguous(), value.contiguous(), tiles, length, padding, books, offset, scale, order,
         steps, angles, key_sinks, value_sinks, each, capacity, kv_heads,
         sinks, limit, count),
        # Tokens may begin in the last place of a tile.
        grid=((count + 2 * TOKENS - 2) // TOKENS, batch * kv_heads), block=128,
        shared=4 * (3 * form.width + each),
    )  # fmt: skip


def variant(form: TileFormat) -> dict[str, int]:
    """Macros of the kernel for a format."""
    return {
        "D": form.width, "BITS": form.bits, "CHANNELS": int(not form.key_scale),
        "OFFSETS": int(form.value_offset), "KEY_SLOTS": form.key_slots,
        "VALUE_SLOTS": form.value_slots, "TURN_KEYS": int(form.turned_keys),
        "TURN_VALUES": int(form.turned_values), "ROTARY": form.rotary,
    }  # fmt: skip
