"""What `quantize-kv` was asked to do, as plain data: built once, stored in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import CALIBRATED_KV, KV_BITS, KV_METHODS, load_entry
from llmsqueeze.recipe import DTYPES, Calibration, make_config, resolved, take_section
from llmsqueeze.recipe_keys import check_section, field_schemas

DEFAULT_KV_METHOD = "kvquant"
DEFAULT_BITS = 4
DEFAULT_SAMPLES, DEFAULT_SEQLEN = 8, 2048
MOST_OUTLIERS = 0.25


@dataclass(frozen=True)
class KvRecipe:
    """method: of KV_METHODS, with its Config if it has one. bits: of a code. outliers: share of the
    entries of every token and head that are kept exactly. sinks: first positions kept in 16 bits.
    dtype, batch: as PruneRecipe's. Outliers, sinks and calibration are of kvquant alone.
    """

    method: str = field(metadata=resolved(KV_METHODS))
    config: Any = None
    bits: int = field(default=DEFAULT_BITS, metadata=resolved())
    outliers: float = 0.0
    sinks: int = 1
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=DEFAULT_SAMPLES))
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    batch: int = 0

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS[self.method]:
            allowed = ", ".join(map(str, KV_BITS[self.method]))
            raise RecipeError(f"--bits {self.bits}: {self.method} has {allowed}")
        if not 0 <= self.outliers <= MOST_OUTLIERS:
            raise RecipeError(
                f"--outliers {self.outliers} is outside [0, {MOST_OUTLIERS}]: it is the share of entries "
                "to keep exactly, for example 0.01"
            )
        if not 0 <= self.sinks <= 64:
            raise RecipeError(f"--sinks {self.sinks} is outside [0, 64]")
        if self.method != CALIBRATED_KV and self.outliers:
            raise RecipeError(f"--outliers belongs to {CALIBRATED_KV}; {self.method} has none")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if self.batch < 0:
            raise RecipeError(f"--batch-size {self.batch}: give a positive number of samples")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps and from_dict reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> KvRecipe:
        """A recipe from plain types, what is left out at its default; RecipeError on unknown keys."""
        raw = dict(raw)
        check_section(raw, field_schemas(cls), [f.name for f in fields(cls)])
        calibration = take_section(raw, "calibration", field_schemas(Calibration))
        method = raw.pop("method", None) or DEFAULT_KV_METHOD
        config = make_config(load_entry(KV_METHODS, method), method, raw, "config")
        bits = raw.pop("bits", None)
        if bits is None:
            bits = DEFAULT_BITS if DEFAULT_BITS in KV_BITS[method] else KV_BITS[method][0]
        return cls(
            method=method,
            config=config,
            bits=bits,
            calibration=Calibration(**{"samples": DEFAULT_SAMPLES, **calibration}),
            **raw,
        )
