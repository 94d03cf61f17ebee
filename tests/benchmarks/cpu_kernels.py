"""Products with compressed weights on a CPU, against the faster of torch's bf16 and fp32 products.

    python -m tests.benchmarks.cpu_kernels --rows 4096 --columns 14336

Random weights, a random share of them zero; three matrices in turn, so that no cache holds them; ratios of
medians of one run. On whatever cores torch uses.
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

MATRICES, REPEATS = 3, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    args = parser.parse_args()
    rows, columns = args.rows, args.columns
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(MATRICES)]
    wide = [w.float() for w in weights]
    print(f"{rows} x {columns}, {torch.get_num_threads()} threads, {cpu.instructions()}")
    print("| tokens | bf16 | fp32 | 50 % | 60 % | 70 % | 2:4 |\n" + "| --- " * 7 + "|")
    packed = {
        share: [pack_bitmask(_zeroed(w, share)) for w in weights] for share in (0.5, 0.6, 0.7)
    }
    halved = [pack_bitmask(w * torch.tensor([1, 0, 1, 0]).repeat(columns // 4)) for w in weights]
    for tokens in (1, 4, 16):
        x = torch.randn(tokens, columns)
        narrow = x.bfloat16()
        dense = [
            milliseconds(lambda i, x=narrow: linear(x, weights[i])),
            milliseconds(lambda i, x=x: linear(x, wide[i])),
        ]
        cells = [f"{tokens}", *(f"{found:.2f} ms" for found in dense)]
        for parts in (*packed.values(), halved):
            found = milliseconds(lambda i, x=x, p=parts: cpu.bitmask_linear(x, *p[i], None))
            cells.append(f"{found:.2f} ms, {min(dense) / found:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def _zeroed(weight: torch.Tensor, share: float) -> torch.Tensor:
    return weight * (torch.rand(weight.shape) >= share)


def milliseconds(call: Callable[[int], object]) -> float:
    """The median of one call, over matrices that take turns."""
    for index in range(MATRICES):
        call(index)
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for index in range(MATRICES):
            call(index)
        found.append((time.perf_counter() - began) / MATRICES * 1e3)
    return statistics.median(found)


if __name__ == "__main__":
    main()
