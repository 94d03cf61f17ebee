"""Which variants of the kernels there are: for compiling them before they are needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from llmsqueeze.numerics import gaps
from llmsqueeze.numerics.kv_tiles import FP8, TileFormat
from llmsqueeze.ops import cuda, kernels

# A shape of each kind that a launcher tells apart.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 65)
_ROWS = (64, 9000)
_GATED = ((64, 4096), (9000, 4096), (20_000, 4096), (64, 14_336), (1000, 576))
# Heads, kv heads and widths of heads: Llama 2 and 3, SmolLM2-135M, Qwen3, Gemma 3.
_HEADS = (
    (32, 32, 128),
    (32, 8, 128),
    (16, 8, 128),
    (9, 3, 64),
    (32, 8, 64),
    (4, 1, 256),
    (8, 4, 256),
)
# Windows, as Mistral-7B and Phi-3 have one, and nats from which tiles are left out.
_ATTENDED = ((0, 0.0), (4096, 0.0), (0, 10.0))


def all_variants(arch: str, dtype: torch.dtype) -> list[cuda.Variant]:
    """What launches on a GPU of this architecture ask for, over shapes and numbers of tokens.

    Layers of other widths than 576, 4096 and 14336 may need another variant behind a gate, and heads that
    are shared otherwise another one of attention.
    """
    with cuda.recording(arch) as found:
        for rows in _ROWS:
            stream = torch.zeros(-(-rows // 16), 1, 9, 32, 4, dtype=torch.int32)
            for tokens in _TOKENS:
                x = torch.zeros(tokens, 256, dtype=dtype)
                kernels.sparse24_linear(x, stream, None, rows)
                kernels.mixed24_linear(x, stream, stream, stream, stream, None, rows)
        for bits, parts, tokens in itertools.product((3, 4), (1, 2), _TOKENS):
            x = torch.zeros(tokens, 64, dtype=dtype)
            # The small ring with few rows and many, the large one, and none.
            for slices, span in ((4, 0), (4000, 0), (4, 2048), (4, 4096)):
                first = torch.zeros(slices + 1, dtype=torch.int32)
                starts = torch.zeros(slices, dtype=torch.int16).expand(40 * slices, -1)
                kernels.gap_linear(
                    x, starts, starts, first, None, None, 16, bits, parts, 10, 4, 64,
                    [span] * len(gaps.TURNS),
                )  # fmt: skip
        for rows, columns in _GATED:
            x, threshold = torch.zeros(1, columns, dtype=dtype), torch.zeros(1)
            # Only strides and shapes count.
            weight = torch.empty(columns, -(-rows // 16) * 16, dtype=dtype, device="meta")
            codes = weight.to(torch.int8).t()[:rows]
            kernels.gated_linear(x, threshold, weight.t()[:rows], None, None, None)
            kernels.gated_int8_linear(x, threshold, codes, weight[0, :rows], None, None, None)
            keep = weight[:, ::16]
            kernels.gated_24_linear(x, threshold, weight, keep, None, None, None, None, rows)
        kernels.outputs24_linear(
            torch.zeros(3, 64, dtype=dtype), x, torch.zeros(64, 1), None, None, 0, 16
        )
        for heads, kv_heads, width in _HEADS:
            q, k = (torch.zeros(1, n, 1, width, dtype=dtype) for n in (heads, kv_heads))
            k = k.expand(1, kv_heads, 128, width)
            kernels.attend(q, k, k, None, torch.zeros(kv_heads), 1.0)
            for form in _formats(width, all_of=(heads, kv_heads, width) == (32, 8, 128)):
                tiles = torch.empty(1, kv_heads, 8, form.record, dtype=torch.uint8, device="meta")
                default = form.bits == 4 and not form.key_scale and width == 128
                for window, skip in _ATTENDED if default else _ATTENDED[:1]:
                    kernels.kv_attend(
                        q, tiles, q, None, None, None, None, None, None, None, None,
                        torch.zeros(kv_heads), form.arguments(), window, 1.0, skip,
                    )  # fmt: skip
                key = k[:, :, :1]
                kernels.kv_append(
                    key, key, tiles, q, None, None, None, None, None, None, None, None, None,
                    form.arguments(),
                )  # fmt: skip
        return sorted(found)


def _formats(width: int, all_of: bool) -> list[TileFormat]:
    """What quantize-kv makes of a cache by default, or with --kv-cache and an outlier or none."""
    if not all_of:
        return [TileFormat(width, 4, False, turned_values=True, rotary=width)]
    found = [TileFormat(width, FP8, True)]
    for bits in (4, 3, 2):
        found.append(TileFormat(width, bits, True, turned_keys=True, turned_values=True))
        for slots in (0, 1):
            keys_alone = TileFormat(width, bits, False, key_slots=slots, turned_values=True)
            found.append(dataclasses.replace(keys_alone, rotary=width))
    return found


def warm(
    arch: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    on_kernel: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Compile every variant that is not in the cache yet; how many there are. Needs no GPU."""
    found = sorted({variant for dtype in dtypes for variant in all_variants(arch, dtype)})
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(cuda.cubin, name, dict(macros), arch) for name, macros in found]
        for done, job in enumerate(jobs):
            job.result()
            on_kernel(done + 1, len(found))
    return len(found)
