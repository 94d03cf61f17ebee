"""Timing kernels as decoding meets them: cold weights, many launches, one CUDA graph.

Every figure stands beside the byte bound and the best dense product of the same run, and counts only when
its result was right.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import ops
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import gaps, int8, masks, mixed24, outputs24, sparse24

# Of weights in one graph, all different: no cache holds them.
COLD_BYTES = 560_000_000
# What one replay reads at least, so that its start does not count.
REPLAY_BYTES = 1_600_000_000
REPEATS = 9
# ‖y - reference‖ / ‖reference‖ of a result rounded to bf16 is 1.7e-3.
TOLERANCE = 4e-3

Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one product: the median of the repeats, the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """One line of the table. bound: how many times fewer bytes than dense; speedup: over the best dense;
    error: of the result against fp64."""

    rows: int
    columns: int
    tokens: int
    kernel: str
    timing: Timing
    bits: float
    bound: float
    speedup: float
    error: float

    def gigabytes(self) -> float:
        """Weight bytes a second, in 10^9."""
        return self.bits / 8 * self.rows * self.columns / self.timing.median / 1e3


def time_calls(call: Call, copies: int, bytes_each: int, repeats: int = REPEATS) -> Timing:
    """Of call(i) for i below `copies`, which must read different memory."""
    rounds = max(1, -(-REPLAY_BYTES // (copies * bytes_each)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(min(copies, 3)):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for index in range(copies):
                call(index)
    for _ in range(2):
        graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / (rounds * copies))
    return Timing(statistics.median(found), min(found), max(found))


def copies_of(*tensors: Tensor) -> tuple[list[tuple[Tensor, ...]], int]:
    """Enough copies of these tensors to overflow every cache, and the bytes of one."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = max(2, -(-COLD_BYTES // size))
    return [tuple(t.clone() for t in tensors) for _ in range(count)], size


def relative_error(y: Tensor, reference: Tensor) -> float:
    """‖y - reference‖ / ‖reference‖, in fp64."""
    reference = reference.double()
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def best_dense(weight: Tensor, x: Tensor) -> Timing:
    """The fastest of cuBLAS and, for one token, a Triton kernel."""
    held, size = copies_of(weight)
    calls: list[Call] = [lambda i: torch.nn.functional.linear(x, held[i][0])]
    if x.shape[0] == 1:
        calls.append(lambda i: torch.mv(held[i][0], x[0]))
        calls += [_gemv(held, x, *shape) for shape in _GEMV_SHAPES]
    return min((time_calls(c, len(held), size) for c in calls), key=lambda t: t.median)


def compare(
    weight: Tensor, x: Tensor, dense: Timing, name: str, tensors: Sequence[Tensor],
    call: Callable[..., Tensor], reference: Tensor, read: float = 1.0,
) -> Row:  # fmt: skip
    """One kernel beside dense. call: of x and the tensors, which hold the weights; read: share of them that
    is read."""
    held, size = copies_of(*tensors)
    timing = time_calls(lambda i: call(x, *held[i]), len(held), size)
    error = max(relative_error(call(x, *h), reference) for h in (held[0], held[-1]))
    if not error <= TOLERANCE:
        raise EnvironmentFault(f"{name}: wrong result on this GPU (relative error {error:.2g})")
    bits = 8 * size * read / weight.numel()
    return Row(
        weight.shape[0], weight.shape[1], x.shape[0], name, timing, bits,
        16 / bits, dense.median / timing.median, error,
    )  # fmt: skip


def kernel_rows(rows: int, columns: int, tokens: int, seed: int = 0) -> Iterator[Row]:
    """Every kernel on one shape: random weights, pruned to the pattern by magnitude times a column norm."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    weight, x = normal(rows, columns).bfloat16(), normal(tokens, columns).bfloat16()
    scores = weight.float().abs() * (
        torch.rand(columns, device=device, generator=generator) * 2 + 0.2
    )
    dense = best_dense(weight, x)
    yield Row(rows, columns, tokens, "dense", dense, 16, 1, 1, 0)

    keep = torch.zeros_like(scores, dtype=torch.bool).unflatten(1, (-1, 4))
    keep.scatter_(2, scores.unflatten(1, (-1, 4)).topk(2, -1).indices, True)
    pruned = weight * keep.flatten(1)
    reference = x.double() @ pruned.double().t()
    yield compare(
        weight, x, dense, "2:4", (sparse24.pack(pruned),),
        lambda x, s: torch.ops.llmsqueeze.sparse24_linear(x, s, None, rows), reference,
    )  # fmt: skip
    for sparsity in (0.25, 0.35, 0.45):
        tiles = -(-rows // 128) * -(-columns // 128)
        pruned = weight * masks.keep_tiles(scores, 128, round(tiles * (1 - 2 * sparsity)))
        mixed = mixed24.pack(pruned)
        reference = x.double() @ pruned.double().t()
        yield compare(
            weight, x, dense, f"tiles {sparsity:.0%}", (mixed.stream, mixed.metadata),
            lambda x, s, d, m=mixed: torch.ops.llmsqueeze.mixed24_linear(
                x, s, m.entries, d, m.starts, None, rows
            ),
            reference,
        )  # fmt: skip
    for sparsity in (0.5, 0.6, 0.7):
        kept = scores.topk(round(columns * (1 - sparsity)), dim=1).indices
        pruned = torch.zeros_like(weight).scatter_(1, kept, weight.gather(1, kept))
        reference = x.double() @ pruned.double().t()
        packed = gaps.pack_best(pruned)
        stream, starts, order = packed.stream, packed.starts.view(torch.int16), packed.moved()
        # One token's lanes read where their first block begins, and no more of the starts.
        read = stream.nbytes / (stream.nbytes + starts.nbytes) if tokens == 1 else 1.0
        yield compare(
            weight, x, dense, f"unstructured {sparsity:.0%}",
            (stream, starts),
            lambda x, s, b, p=packed, o=order: torch.ops.llmsqueeze.gap_linear(
                x, s, b.view(torch.uint16), p.first, o, None, rows, *p.arguments()
            ),
            reference, read,
        )  # fmt: skip
    if tokens > 1:
        return
    codes, largest = int8.encode(weight)
    scale = int8.scales(largest)
    kept = masks.keep_nm_out(weight.float().abs(), 2, 4, 0.0)
    halved = weight * kept
    columns24 = outputs24.pack(halved)
    stored, stored8 = ops.input_major(weight).t(), ops.input_major(codes).t()
    exact8 = codes.double() * scale.double()[:, None]
    yield compare(
        weight, x, dense, "int8", (stored8, scale),
        lambda x, c, s: torch.ops.llmsqueeze.int8_linear(x, c.t(), s, None),
        x.double() @ exact8.t(),
    )  # fmt: skip
    for sparsity in (0.4, 0.5, 0.65):
        limit = x.abs().float().quantile(sparsity)
        # As runtime.packed keeps thresholds that differ.
        threshold = ops.round_down(limit.expand(columns), x.dtype)
        kept_x = x.double() * (x.abs().float() > limit)
        read = float((kept_x != 0).double().mean())
        name = f"activations {sparsity:.0%}"
        yield compare(
            weight, x, dense, name, (stored,),
            lambda x, s, t=threshold: torch.ops.llmsqueeze.gated_linear(x, t, s.t(), None, None, None),
            kept_x @ weight.double().t(), read=read,
        )  # fmt: skip
        yield compare(
            weight, x, dense, f"{name} × 2:4-out", (columns24.values, columns24.keep),
            lambda x, v, k, t=threshold: torch.ops.llmsqueeze.gated_24_linear(
                x, t, v, k, columns24.index, None, None, None, rows
            ),
            kept_x @ halved.double().t(), read=read,
        )  # fmt: skip
        yield compare(
            weight, x, dense, f"{name} × int8", (stored8, scale),
            lambda x, c, s, t=threshold: torch.ops.llmsqueeze.gated_int8_linear(
                x, t, c.t(), s, None, None, None
            ),
            kept_x @ exact8.t(), read=read,
        )  # fmt: skip


# Rows and columns of a program, and its warps: what is fastest on an H100, and its neighbours.
_GEMV_SHAPES = ((4, 2048, 8), (2, 1024, 4), (1, 2048, 4), (8, 1024, 8))


def _gemv(held: list[tuple[Tensor, ...]], x: Tensor, rows: int, columns: int, warps: int) -> Call:
    from llmsqueeze.dense_gemv import gemv

    def call(index: int) -> Tensor:
        return gemv(held[index][0], x[0], rows, columns, warps)

    return call


def table(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Iterator[Row]:
    """Every kernel on every shape and number of tokens."""
    if not torch.cuda.is_available():
        raise EnvironmentFault("bench kernels needs a CUDA GPU; none is visible to torch")
    for rows, columns in shapes:
        for count in tokens:
            yield from kernel_rows(rows, columns, count)


def as_json(row: Row) -> dict[str, Any]:
    """For reports; the achieved share of the bound beside it."""
    return {
        "rows": row.rows, "columns": row.columns, "tokens": row.tokens, "kernel": row.kernel,
        "microseconds": row.timing.median, "range": [row.timing.least, row.timing.most],
        "bits_per_weight": row.bits, "gb_per_second": row.gigabytes(), "bound": row.bound,
        "speedup": row.speedup, "of_bound": row.speedup / row.bound, "error": row.error,
    }  # fmt: skip
