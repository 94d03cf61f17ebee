"""Attention of one token over a cache in tiles on a GPU, against the fastest of torch's over one in bf16.

    python -m tests.benchmarks.kv_attend_gpu --tokens 32768,131072 --set PAIRED=0

Random keys and values. One CUDA graph walks through different caches, 4 GB of them: more than a GPU's second
level holds, and enough that where they happen to lie in memory evens out. (Two or three caches of 128K tokens
were read 20 % slower on some GPUs than on others, by a kernel that does nothing else as well.)
Every set is timed by turns, in one run: macros of the kernel that stand instead of those it is launched with.
Errors are those of the reference in fp32, of the last cache's result. Of the bound: the
speed-up as a share of how many times fewer bytes are read.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llmsqueeze.ops import kv_attend, kv_kernels
from tests.test_kv_attend import make_case, query_for

FORMATS = {
    "channels 4": ("channels-turned", 4, 0), "channels 4 outliers": ("channels", 4, 1),
    "channels 3": ("channels-turned", 3, 0), "rotate 4": ("rotated", 4, 0), "rotate 3": ("rotated", 3, 0),
    "fp8": ("fp8", 8, 0),
}  # fmt: skip
BYTES, REPEATS = 4_000_000_000, 9
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--skip", type=float, default=0.0, help="nats")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--set", action="append", default=[], metavar="MACRO=N,…")
    args = parser.parse_args()
    own = kv_kernels.variant
    sets = [{}, *(dict(_pair(part) for part in text.split(",")) for text in args.set)]
    print(
        torch.cuda.get_device_name(), f"batch {args.batch}, window {args.window}, skip {args.skip}"
    )
    for tokens in map(int, args.tokens.split(",")):
        dense = [_microseconds([_dense(args.batch, tokens, b)])[0] for b in BACKENDS]
        print(f"{tokens} tokens: cuDNN {dense[0]:.2f} µs, flash {dense[1]:.2f}", flush=True)
        for name in args.formats.split(","):
            kind, bits, slots = FORMATS[name]
            case = make_case(
                kind, bits, batch=args.batch, kv_heads=8, width=128, tokens=tokens, slots=slots,
                device="cuda", spare=0, theta=5e5,
            )  # fmt: skip
            q = query_for(case, 4, torch.bfloat16)
            given = case.arguments(q, args.window, 128**-0.5)
            tiles = [case.tiles.clone() for _ in range(-(-BYTES // case.tiles.numel()))]
            expected = kv_attend(q.float(), *given[1:]).double()  # type: ignore[arg-type]
            calls, errors = [], []
            for macros in sets:
                kv_kernels.variant = lambda *a, macros=macros: own(*a) | macros
                y = torch.ops.llmsqueeze.kv_attend(*given, args.skip).double()
                errors.append(float((y - expected).norm() / expected.norm()))
                calls.append([functools.partial(_tiled, given, t, args.skip) for t in tiles])
            graphs = []
            for macros, some in zip(sets, calls, strict=True):
                kv_kernels.variant = lambda *a, macros=macros: own(*a) | macros
                graphs.append(_graph(some))
            kv_kernels.variant = own
            size = case.tiles.numel() * case.tiles.element_size()
            fewer = args.batch * 8 * tokens * 2 * 128 * 2 / size
            for macros, micros, error in zip(sets, _timed(graphs), errors, strict=True):
                text = ", ".join(f"{k}={v}" for k, v in macros.items()) or "as launched"
                faster = min(dense) / micros
                print(
                    f"  {name}: {micros:.2f} µs, {size / micros / 1e6:.2f} TB/s, {faster:.2f} ×, "
                    f"{faster / fewer:.2f} of the bound {fewer:.2f}, off {error:.1e}  [{text}]",
                    flush=True,
                )


def _tiled(given: tuple[object, ...], tiles: Tensor, skip: float) -> Tensor:
    y: Tensor = torch.ops.llmsqueeze.kv_attend(given[0], tiles, *given[2:], skip)
    return y


def _pair(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def _dense(batch: int, tokens: int, backend: SDPBackend) -> list[Callable[[], Tensor]]:
    size = 2 * 2 * batch * 8 * tokens * 128
    held = [
        torch.randn(2, batch, 8, tokens, 128, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(2, -(-BYTES // size)))
    ]
    q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.bfloat16)

    def call(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return [lambda kv=kv: call(kv[0], kv[1]) for kv in held]


def _microseconds(calls: list[list[Callable[[], Tensor]]]) -> list[float]:
    return _timed([_graph(some) for some in calls])


def _graph(calls: list[Callable[[], Tensor]]) -> tuple[torch.cuda.CUDAGraph, int]:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, len(calls)


def _timed(graphs: list[tuple[torch.cuda.CUDAGraph, int]]) -> list[float]:
    """Microseconds of a call, medians of replays by turns."""
    found: list[list[float]] = [[] for _ in graphs]
    for repeat in range(-2, REPEATS):
        for (graph, count), times in zip(graphs, found, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 0:
                times.append(1e3 * begin.elapsed_time(end) / count)
    return [statistics.median(times) for times in found]


if __name__ == "__main__":
    main()
