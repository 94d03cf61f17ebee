"""What this machine has, and whether it computes right."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze import ops
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import gaps, int8, masks, mixed24, outputs24, panels, sparse24
from llmsqueeze.numerics.kv_codecs import Rotated
from llmsqueeze.numerics.kv_constants import books
from llmsqueeze.numerics.kv_tiles import TileFormat
from llmsqueeze.numerics.packing import pack_bitmask
from llmsqueeze.ops import cpu, cuda
from llmsqueeze.ops.packed_append import encoding_books

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "cuda-core",
    "cuda-bindings",
    "triton",
)
# ‖y - fp64‖ / ‖fp64‖ of a result in bf16.
TOLERANCE = 4e-3
_ROWS, _COLUMNS = 512, 1024


@dataclass(frozen=True)
class Check:
    """One operator on one device: the largest error found, and seconds."""

    operator: str
    device: str
    error: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


def versions() -> dict[str, str]:
    """Of Python and the packages that matter; those that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, object]]:
    """Every GPU that torch sees. kernels: None if they run there, else why not."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "kernels": _why_not(properties.major),
            }
        )
    return found


def _why_not(major: int) -> str | None:
    if major < 8:
        return "they need compute capability 8.0"
    try:
        cuda.compiler()
    except EnvironmentFault as error:
        return str(error)
    return None


def cpu_kernels() -> str | None:
    """Instructions that kernels for the CPU use here; None if they were not built."""
    return cpu.instructions()


def cached_kernels() -> tuple[Path, int]:
    """The folder of compiled kernels, and how many it has."""
    folder = cuda.cubin_folder()
    return folder, len(list(folder.glob("*.cubin")))


# An operator at work: of x, what it computes, and in fp64 what that should be.
Case = tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]


@torch.no_grad()
def self_test(device: torch.device) -> list[Check]:
    """Every operator on small random weights, against fp64."""
    generator = torch.Generator().manual_seed(0)
    checks = []
    attention = _attention(device, generator), _tiles(device, generator)
    for name, call, expect, counts in (*_linears(device, generator), *attention):
        began = time.perf_counter()
        worst = 0.0
        for tokens in counts:
            x = torch.randn(tokens, _COLUMNS, generator=generator).bfloat16().to(device)
            expected = expect(x)
            worst = max(worst, float((call(x).double() - expected).norm() / expected.norm()))
        checks.append(Check(name, str(device), worst, time.perf_counter() - began))
    return checks


def _linears(device: torch.device, generator: torch.Generator) -> list[Case]:
    magnitude = torch.rand(_ROWS, _COLUMNS, generator=generator)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator).bfloat16().to(device)
    scores = magnitude.to(device)
    halved, loose = weight * masks.keep_nm(scores, 2, 4), weight * (scores < 0.5)
    tiles = weight * masks.keep_tiles(scores, 128, 8)
    along = weight * masks.keep_nm_out(scores, 2, 4, 0.02)
    stream, packed, mixed = sparse24.pack(halved), gaps.pack_best(loose), mixed24.pack(tiles)
    columns, whole = outputs24.pack(along), ops.input_major(weight)
    codes, largest = int8.encode(weight)
    eight, rounded = (ops.input_major(codes), int8.scales(largest)), int8.round_weight(weight)
    fields = packed.stream, packed.starts, packed.first, packed.order, None, _ROWS
    threshold = torch.full((1,), 0.6, device=device)
    library = torch.ops.llmsqueeze

    def of(dense: Tensor, gated: bool = False) -> Callable[[Tensor], Tensor]:
        def expect(x: Tensor) -> Tensor:
            seen = x.double() * (x.float().abs() > threshold) if gated else x.double()
            return seen @ dense.double().t()

        return expect

    mask, runs = pack_bitmask(loose.cpu()), tuple(vars(panels.pack(loose.cpu())).values())
    three, out = (None, None, None), (columns.values, columns.keep, columns.index)
    cpu_only: list[Case] = [
        ("bitmask_linear", lambda x: library.bitmask_linear(x, *mask, None), of(loose), (1, 16, 64)),
        ("dense_linear", lambda x: library.dense_linear(x, weight, None), of(weight), (1, 16, 64)),
        ("gated_bitmask_linear", lambda x: library.gated_bitmask_linear(
            x, threshold, *runs, *three, _ROWS), of(loose, True), (1, 2)),
        ("panels_linear", lambda x: library.panels_linear(x, *runs, None, 0, _ROWS), of(loose), (64,)),
    ]  # fmt: skip
    return [
        ("sparse24_linear", lambda x: library.sparse24_linear(x, stream, None, _ROWS), of(halved),
         (1, 8, 64)),
        ("mixed24_linear", lambda x: library.mixed24_linear(x, *vars(mixed).values(), None, _ROWS),
         of(tiles), (1, 8, 64)),
        ("gap_linear", lambda x: library.gap_linear(x, *fields, *packed.arguments()), of(loose),
         (1, 4, 16, 64)),
        ("int8_linear", lambda x: library.int8_linear(x, *eight, None), of(rounded), (1, 64)),
        ("gated_linear", lambda x: library.gated_linear(x, threshold, whole, *three),
         of(weight, True), (1, 2)),
        ("gated_int8_linear", lambda x: library.gated_int8_linear(x, threshold, *eight, *three),
         of(rounded, True), (1, 2)),
        ("gated_24_linear", lambda x: library.gated_24_linear(x, threshold, *out, *three, _ROWS),
         of(along, True), (1, 2)),
        ("outputs24_linear", lambda x: library.outputs24_linear(x, *out, None, 0, _ROWS), of(along),
         (64,)),
        *(cpu_only if device.type == "cpu" else []),
    ]  # fmt: skip


def _attention(device: torch.device, generator: torch.Generator) -> Case:
    """Of 8 heads over 2 kv heads, 128 wide, and 300 tokens that each sequence has cached."""
    k, v = torch.randn(2, 1, 2, 300, 128, generator=generator).bfloat16().to(device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)

    def call(x: Tensor) -> Tensor:
        held = (t.expand(len(x), -1, -1, -1) for t in (k, v))
        q = x.view(len(x), 8, 1, 128)
        y: Tensor = torch.ops.llmsqueeze.attend(q, *held, None, counters, 0.1)
        return y

    def expect(x: Tensor) -> Tensor:
        q = x.double().view(len(x), 2, 4, 128)
        return _softmax_attention(q, k, v)

    return "attend", call, expect, (1, 3)


def _tiles(device: torch.device, generator: torch.Generator) -> Case:
    """The same over 40 tokens that were coded one after another: 3 bits, heads turned before."""
    k, v = torch.randn(2, 1, 2, 40, 128, generator=generator).bfloat16().to(device)
    codec = Rotated(3)
    format = TileFormat.of(codec, codec, 128)
    assert format is not None
    tiles = format.empty(1, 2, k.shape[2], device)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    encoding, decoding = encoding_books(codec, codec), books(codec, codec, format)
    encoding, decoding = (t if t is None else t.to(device) for t in (encoding, decoding))

    def call(x: Tensor) -> Tensor:
        length.zero_()
        for one in zip(k.split(1, dim=2), v.split(1, dim=2), strict=True):
            length.add_(1)
            torch.ops.llmsqueeze.kv_append(
                *one, tiles, length, None, encoding, *[None] * 7, format.arguments()
            )
        held = tiles.expand(len(x), -1, -1, -1).contiguous()
        y: Tensor = torch.ops.llmsqueeze.kv_attend(
            x.view(len(x), 8, 1, 128), held, length, None, decoding, *[None] * 6, counters,
            format.arguments(), 0, 0.1,
        )  # fmt: skip
        return y

    def expect(x: Tensor) -> Tensor:
        held = (codec.decode(codec.encode(t.float()), 128, torch.float32) for t in (k, v))
        return _softmax_attention(x.double().view(len(x), 2, 4, 128), *held)

    return "kv_append, kv_attend", call, expect, (1, 3)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[tokens, 1, 8, 128] fp64, of q [tokens, 2, 4, 128]."""
    weights = (0.1 * q @ k.double().mT).softmax(-1)
    return (weights @ v.double()).reshape(len(q), 1, 8, 128)
