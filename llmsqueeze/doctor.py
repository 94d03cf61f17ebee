"""What this machine has, and whether it computes right."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze import ops
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import gaps, sparse24
from llmsqueeze.ops import cuda

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


def cached_kernels() -> tuple[Path, int]:
    """The folder of compiled kernels, and how many it has."""
    folder = cuda.cubin_folder()
    return folder, len(list(folder.glob("*.cubin")))


@torch.no_grad()
def self_test(device: torch.device) -> list[Check]:
    """Every operator on small random weights, against fp64."""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(_ROWS, _COLUMNS, generator=generator)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator).bfloat16()
    keep = (magnitude.view(_ROWS, -1, 4).argsort(-1) < 2).flatten(1)
    tiled, loose = (weight * keep).to(device), (weight * (magnitude < 0.5)).to(device)
    stream, packed = sparse24.pack(tiled), gaps.pack_best(loose)
    whole = ops.input_major(weight.to(device))
    threshold = torch.full((_COLUMNS,), 0.6, device=device)
    library = torch.ops.llmsqueeze

    def gated(x: Tensor) -> Tensor:
        return library.gated_linear(x, threshold, whole, None, None, None)

    def gap(x: Tensor) -> Tensor:
        shape = packed.shape.bits, packed.shape.parts, packed.blocks, packed.reach
        return library.gap_linear(
            x, packed.stream, packed.starts, packed.first, packed.order, None, _ROWS, *shape
        )

    def two_four(x: Tensor) -> Tensor:
        return library.sparse24_linear(x, stream, None, _ROWS)

    checks = []
    for name, call, dense, counts in (
        ("sparse24_linear", two_four, tiled, (1, 8, 64)),
        ("gap_linear", gap, loose, (1, 4, 64)),
        ("gated_linear", gated, whole, (1, 2)),
    ):
        began = time.perf_counter()
        worst = 0.0
        for tokens in counts:
            x = torch.randn(tokens, _COLUMNS, generator=generator).bfloat16().to(device)
            seen = x.double()
            if call is gated:
                seen = seen * (x.float().abs() > threshold)
            expected = seen @ dense.double().t()
            worst = max(worst, float((call(x).double() - expected).norm() / expected.norm()))
        checks.append(Check(name, str(device), worst, time.perf_counter() - began))
    return checks
