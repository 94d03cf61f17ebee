"""Products with compressed weights on a CPU, against the faster of torch's bf16 and fp32 products.

    python -m tests.benchmarks.cpu_kernels --rows 4096 --columns 14336

Random weights, a random share of them zero; three matrices in turn, so that no cache holds them. All take
turns, dense products too, and each round gives a ratio: their median is printed, and medians of times.
Inputs are in bf16 or in fp32, whichever suits a product better. On whatever cores torch uses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu

MATRICES = 3
DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows, columns = args.rows, args.columns
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(MATRICES)]
    wide = [w.float() for w in weights]
    print(f"{rows} x {columns}, {torch.get_num_threads()} threads, {cpu.instructions()}")
    print("| tokens | bf16 | fp32 | 50 % | 60 % | 70 % | 2:4 |\n" + "| --- " * 7 + "|")
    packed = [[pack_bitmask(_zeroed(w, share)) for w in weights] for share in (0.5, 0.6, 0.7)]
    packed.append(
        [pack_bitmask(w * torch.tensor([1, 0, 1, 0]).repeat(columns // 4)) for w in weights]
    )
    for tokens in map(int, args.tokens.split(",")):
        x = torch.randn(tokens, columns)
        narrow = x.bfloat16()
        calls: list[Callable[[int], object]] = [
            lambda i, x=narrow: linear(x, weights[i]), lambda i, x=x: linear(x, wide[i])
        ]  # fmt: skip
        for parts in packed:
            calls += [
                lambda i, x=x, p=parts: cpu.bitmask_linear(x, *p[i], None) for x in (narrow, x)
            ]
        times = by_turns(calls, args.rounds)
        pairs = [
            [min(pair) for pair in zip(*times[i : i + 2], strict=True)]
            for i in range(0, len(times), 2)
        ]
        cells = [f"{tokens}", *(f"{statistics.median(found):.2f} ms" for found in times[:2])]
        for found in pairs[1:]:
            ratio = statistics.median(d / t for d, t in zip(pairs[0], found, strict=True))
            cells.append(f"{statistics.median(found):.2f} ms, {ratio:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def _zeroed(weight: torch.Tensor, share: float) -> torch.Tensor:
    return weight * (torch.rand(weight.shape) >= share)


def by_turns(calls: list[Callable[[int], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of every call in every round, over matrices that take turns."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(-1, rounds):
        for call, times in zip(calls, found, strict=True):
            began = time.perf_counter()
            for index in range(MATRICES):
                call(index)
            if turn >= 0:
                times.append((time.perf_counter() - began) / MATRICES * 1e3)
    return found


if __name__ == "__main__":
    main()
