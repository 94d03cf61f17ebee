"""Recipes by goal, of parts whose costs were measured: README. tests/benchmarks/preset_table.py measures them
whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """summary: for help texts; recipe: in the shape of a recipe file."""

    summary: str
    recipe: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "fastest": Preset(
        "int8, half of what linears read skipped, KV cache in 3 bits",
        {
            "encode": {"to": "int8"},
            "sparsify": {"sparsity": 0.5},
            "quantize-kv": {"bits": 3, "outliers": 0.01},
        },
    ),
    "balanced": Preset(
        "int8, a quarter of what linears read skipped, KV cache in 4 bits",
        {
            "encode": {"to": "int8"},
            "sparsify": {"sparsity": 0.25},
            "quantize-kv": {"bits": 4, "outliers": 0.01},
        },
    ),
    "careful": Preset(
        "int8, every input read, KV cache in 4 bits",
        {"encode": {"to": "int8"}, "quantize-kv": {"bits": 4, "outliers": 0.03}},
    ),
}
