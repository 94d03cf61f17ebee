"""What a run was asked to do, as plain data: built once, stored in the manifest."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import WEIGHT_METHODS, weight_method
from llmsqueeze.methods.base import Target

DTYPES = ("auto", "float32", "bfloat16", "float16")
ORDERS = ("group", "block")


@dataclass(frozen=True)
class Calibration:
    """Which tokens statistics are gathered on.

    text: None means the bundled texts. seqlen: None means 2048, or less if the model has less.
    """

    text: str | None = None
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    bos: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples}: at least one sample is needed")
        if self.seqlen is not None and self.seqlen < 2:
            raise RecipeError(f"--seqlen {self.seqlen}: a window needs at least two tokens")


@dataclass(frozen=True)
class PruneRecipe:
    """method and its config, how much to remove where, and on which tokens.

    ignore: linears left dense; a full module name, its last components, or `re:` and a regular
    expression searched in the full name. dtype: of the calibration's computation.
    batch: calibration samples per forward pass; 0 lets the device decide. order: see calibrate.walk.
    """

    method: str
    target: Target
    config: Any
    ignore: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    dtype: str = "auto"
    batch: int = 0
    order: str = "group"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if self.order not in ORDERS:
            raise RecipeError(f"order {self.order!r}; choose from {', '.join(ORDERS)}")
        if self.batch < 0:
            raise RecipeError(f"--batch-size {self.batch}: give a positive number of samples")
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise RecipeError(f"--ignore {pattern}: not a regular expression") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps."""
        raw = asdict(self)
        raw["target"] = {
            "sparsity": self.target.sparsity,
            "pattern": self.target.pattern_name,
        }
        raw["ignore"] = list(self.ignore)
        if not weight_method(self.method).needs(self.config):
            raw["calibration"] = None
        return raw


def method_config(method: str, options: dict[str, Any]) -> Any:
    """The method's Config from the options that were given; RecipeError on one it does not have."""
    config = weight_method(method).Config
    known = {f.name for f in fields(config)}
    for name in options:
        if name not in known:
            owners = [m for m in WEIGHT_METHODS if name in config_fields(m)]
            flag = "--" + name.replace("_", "-")
            raise RecipeError(f"{flag} belongs to {', '.join(owners) or 'no method'}, not {method}")
    return config(**options)


def config_fields(method: str) -> dict[str, Any]:
    """The dataclass fields of a method's Config by name."""
    return {f.name: f for f in fields(weight_method(method).Config)}


def is_ignored(name: str, patterns: tuple[str, ...]) -> list[str]:
    """The patterns that exclude the module `name`."""
    return [
        pattern
        for pattern in patterns
        if (
            re.search(pattern[3:], name) if pattern.startswith("re:") else _ends_with(name, pattern)
        )
    ]


def _ends_with(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)
