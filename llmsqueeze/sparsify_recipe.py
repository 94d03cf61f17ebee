"""What `sparsify` was asked to do, as plain data: built once, stored in the manifest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import ACTIVATION_METHODS, activation_method
from llmsqueeze.methods.greedy import MOST
from llmsqueeze.policy import Policy
from llmsqueeze.recipe import (
    DTYPES,
    Calibration,
    check_ignore,
    make_config,
    resolved,
    take_section,
)
from llmsqueeze.recipe_keys import check_section, field_schemas

ALLOCATIONS = ("uniform", "greedy")
# The best of the table in README at equal bytes.
DEFAULT_ACTIVATION_METHOD = "teal"
# What o sees shrinks with the length of the text: thresholds are for windows as long as these.
DEFAULT_SAMPLES, DEFAULT_SEQLEN = 16, 2048


@dataclass(frozen=True)
class SparsifyRecipe:
    """method: of ACTIVATION_METHODS, with its Config. sparsity: share of inputs dropped at every gate, or
    with allocation "greedy" of the bytes behind a block's gates.

    prefill: which prompt tokens are gated when the checkpoint runs; see policy.Policy.
    prefix: tokens of every calibration window that are neither counted nor gated.
    greedy_step: see methods.greedy.allocate. sequential: gates are calibrated on what comes through the
    gates before them, as when the checkpoint runs, instead of on the dense model's activations.
    rotate: turn the residual stream first, see rotation.rotate. ignore, dtype, batch: as PruneRecipe's.
    """

    method: str = field(metadata=resolved(ACTIVATION_METHODS))
    config: Any
    sparsity: float = 0.5
    allocation: str = field(default="uniform", metadata=resolved(ALLOCATIONS))
    greedy_step: float = 0.025
    prefill: str = "dense"
    prefix: int = 4
    sequential: bool = True
    rotate: bool = False
    ignore: tuple[str, ...] = field(default=(), metadata=resolved())
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=DEFAULT_SAMPLES))
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    batch: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0 <= self.sparsity <= MOST):
            raise RecipeError(
                f"sparsity {self.sparsity} is outside [0, {MOST}]: it is the share of inputs to drop, "
                "for example 0.5"
            )
        if self.allocation not in ALLOCATIONS:
            raise RecipeError(
                f"allocation {self.allocation!r}; choose from {', '.join(ALLOCATIONS)}"
            )
        if self.allocation == "greedy" and self.method == "rsparse":
            raise RecipeError("rsparse divides its budget itself; leave --allocation out")
        if not 0.001 <= self.greedy_step <= 1:
            raise RecipeError(f"--greedy-step {self.greedy_step} is outside [0.001, 1]")
        if self.prefix < 0:
            raise RecipeError(f"--prefix {self.prefix} must not be negative")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if self.batch < 0:
            raise RecipeError(f"--batch-size {self.batch}: give a positive number of samples")
        Policy.parse(self.prefill)
        check_ignore(self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps and from_dict reads."""
        return {**asdict(self), "ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> SparsifyRecipe:
        """A recipe from plain types, what is left out at its default; RecipeError on unknown keys."""
        raw = dict(raw)
        check_section(raw, field_schemas(cls), [f.name for f in fields(cls)])
        calibration = take_section(raw, "calibration", field_schemas(Calibration))
        method = raw.pop("method", None) or DEFAULT_ACTIVATION_METHOD
        module = activation_method(method)
        config = make_config(module, method, raw, "config")
        # Greedy lost least in README's table; a method with branches divides its budget by itself.
        allocation = raw.pop("allocation", None) or (
            "uniform" if hasattr(module, "branch") else "greedy"
        )
        return cls(
            method=method,
            config=config,
            allocation=allocation,
            calibration=Calibration(**{"samples": DEFAULT_SAMPLES, **calibration}),
            ignore=tuple(raw.pop("ignore", None) or ()),
            **raw,
        )


@dataclass(frozen=True)
class ThresholdsRecipe:
    """Other thresholds for gates that are there, read off their stored curves; see sparsify.change_sparsity.

    A step of a manifest only. method: none was asked for.
    """

    sparsity: float
    prefill: str = "dense"
    method: None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0 <= self.sparsity <= MOST):
            raise RecipeError(f"sparsity {self.sparsity} is outside [0, {MOST}]")
        Policy.parse(self.prefill)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps and from_dict reads."""
        return {"method": None, "sparsity": self.sparsity, "prefill": self.prefill}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ThresholdsRecipe:
        """From plain types; RecipeError on unknown keys."""
        check_section(raw, field_schemas(cls), ["method"])
        if "sparsity" not in raw:
            raise RecipeError("sparsity is missing")
        return cls(**raw)
