"""Attention of one token over a cache in tiles on a CPU, against torch's over one in bf16 and in fp32.

    python -m tests.benchmarks.kv_attend_cpu --heads 32 --kv-heads 8 --width 128

Random keys and values; caches of several layers in turn, so that no cache of the CPU holds them; medians of
calls by turns in one run. On whatever cores torch uses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmsqueeze.ops import cpu
from tests.test_kv_attend import Case, make_case

FORMATS = {
    "kvquant 4": ("channels-turned", 4, 0), "kvquant 4, outliers": ("channels-turned", 4, 1),
    "kvquant 3": ("channels-turned", 3, 0), "rotate 4": ("rotated", 4, 0), "rotate 3": ("rotated", 3, 0),
    "rotate 2": ("rotated", 2, 0), "fp8": ("fp8", 8, 0),
}  # fmt: skip
# Of all caches of a kind together, at least: more than a CPU's last level.
BYTES, REPEATS = 2**27, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", default="2048,8192,32768")
    args = parser.parse_args()
    heads, kv_heads, width = args.heads, args.kv_heads, args.width
    print(
        f"{heads} heads over {kv_heads}, {width} wide, {torch.get_num_threads()} threads,",
        cpu.instructions(),
    )
    print("| tokens | bf16 | fp32 | " + " | ".join(FORMATS) + " |\n" + "| --- " * 10 + "|")
    q = torch.randn(1, heads, 1, width)
    for tokens in map(int, args.tokens.split(",")):
        calls: list[Callable[[int], Tensor]] = []
        for dtype in (torch.bfloat16, torch.float32):
            shape = (1, kv_heads, tokens, width)
            count = copies(2 * dtype.itemsize * kv_heads * tokens * width)
            held = [torch.randn(2, *shape).to(dtype) for _ in range(count)]
            x = q.to(dtype)
            calls.append(lambda i, held=held, x=x: dense(x, held[i % len(held)]))
        for kind, bits, slots in FORMATS.values():
            case = make_case(
                kind, bits, batch=1, kv_heads=kv_heads, width=width, tokens=tokens, slots=slots
            )
            tiles = [case.tiles.clone() for _ in range(copies(case.tiles.numel()))]
            calls.append(lambda i, case=case, tiles=tiles: packed(q, case, tiles[i % len(tiles)]))
        found: list[list[float]] = [[] for _ in calls]
        for repeat in range(-2, REPEATS):
            for call, times in zip(calls, found, strict=True):
                began = time.perf_counter()
                call(repeat)
                if repeat >= 0:
                    times.append(1e3 * (time.perf_counter() - began))
        medians = [statistics.median(times) for times in found]
        cells = [f"{m:.2f} ms" for m in medians[:2]]
        cells += [f"{m:.2f} ms, {min(medians[:2]) / m:.2f}" for m in medians[2:]]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


def copies(size: int) -> int:
    return -(-BYTES // size)


def dense(q: Tensor, held: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, held[0], held[1], enable_gqa=True)


def packed(q: Tensor, case: Case, tiles: Tensor) -> Tensor:
    given = list(case.arguments(q, 0, q.shape[-1] ** -0.5))
    given[1] = tiles
    return cpu.kv_attend(*given)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
