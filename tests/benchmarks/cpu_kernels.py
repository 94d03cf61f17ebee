"""Products with compressed weights on a CPU, against the faster of torch's bf16 and fp32 products.

    python -m tests.benchmarks.cpu_kernels --rows 4096 --columns 14336

Random weights, a random share of them zero; three matrices in turn, so that no cache holds them. One token
also meets gates that keep half of its inputs. All take turns, dense products too, and each round gives a
ratio: their median is printed, and medians of times. Inputs are in bf16 or in fp32, whichever suits a
product better. On whatever cores torch uses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from llmsqueeze.numerics import int8, panels
from llmsqueeze.numerics.masks import zero_removed
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu, input_major

MATRICES = 3

Product = Callable[[torch.Tensor, int], torch.Tensor]  # of x and the number of a matrix


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
    products = {f"{share:.0%}": _bitmask(_pruned(weights, share)) for share in (0.5, 0.6, 0.7)}
    halved = torch.tensor([True, False, True, False]).repeat(columns // 4)
    products["2:4"] = _bitmask([zero_removed(w, halved) for w in weights])
    for tokens in map(int, args.tokens.split(",")):
        x = torch.randn(tokens, columns)
        narrow = x.bfloat16()
        some = products | (_gated(weights, x) if tokens == 1 else {})
        calls: list[Callable[[int], object]] = [
            lambda i, x=narrow: linear(x, weights[i]), lambda i, x=x: linear(x, wide[i])
        ]  # fmt: skip
        for product in some.values():
            calls += [lambda i, x=x, p=product: p(x, i) for x in (narrow, x)]
        times = by_turns(calls, args.rounds)
        dense, *best = [
            [min(pair) for pair in zip(*times[i : i + 2], strict=True)]
            for i in range(0, len(times), 2)
        ]
        bf16, fp32 = map(statistics.median, times[:2])
        print(f"\n{tokens} at once: dense {bf16:.2f} ms in bf16, {fp32:.2f} ms in fp32", flush=True)
        for name, found in zip(some, best, strict=True):
            ratio = statistics.median(d / t for d, t in zip(dense, found, strict=True))
            print(f"{name:>24}: {statistics.median(found):.2f} ms, {ratio:.2f}", flush=True)


def _pruned(weights: list[torch.Tensor], share: float) -> list[torch.Tensor]:
    return [zero_removed(w, torch.rand(w.shape) >= share) for w in weights]


def _bitmask(weights: list[torch.Tensor]) -> Product:
    packed = [pack_bitmask(w) for w in weights]
    return lambda x, i: cpu.bitmask_linear(x, *packed[i], None)


def _gated(weights: list[torch.Tensor], x: torch.Tensor) -> dict[str, Product]:
    """Behind a gate that keeps the larger half of x."""
    limit = x.abs().median().reshape(1)
    columnwise = [input_major(w) for w in weights]
    encoded = [int8.encode(w) for w in weights]
    codes = [(input_major(codes), int8.scales(largest)) for codes, largest in encoded]
    found: dict[str, Product] = {
        "gate": lambda x, i: cpu.gated_linear(x, limit, columnwise[i], None, None, None),
        "gate, int8": lambda x, i: cpu.gated_int8_linear(x, limit, *codes[i], None, None, None),
    }
    for share in (0.5, 0.7):
        packed = [panels.pack(w) for w in _pruned(weights, share)]
        parts = [(p.values, p.mask, p.row_offsets) for p in packed]
        found[f"gate, {share:.0%}"] = lambda x, i, parts=parts: cpu.gated_bitmask_linear(
            x, limit, *parts[i], None, None, None, len(weights[0])
        )
    return found


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
