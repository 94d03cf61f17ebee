"""What a method is given and what it gives back. No algorithm lives here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmsqueeze.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats


@dataclass(frozen=True)
class NM:
    """n kept of every m consecutive inputs of a row. (The Wanda code counts n *removed*.)"""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 64:
            raise RecipeError(f"pattern {self.n}:{self.m}: n of m needs 0 < n < m <= 64, as in 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m


@dataclass(frozen=True)
class Target:
    """How much to remove from a site, and in which shape.

    sparsity: fraction removed, in [0, 1). pattern: None ranks freely (unstructured).
    """

    sparsity: float
    pattern: NM | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0 <= self.sparsity < 1):
            raise RecipeError(
                f"sparsity {self.sparsity} is outside [0, 1): it is the fraction of weights to "
                "remove, for example 0.5"
            )
        if self.pattern and not math.isclose(self.sparsity, self.pattern.sparsity, abs_tol=1e-9):
            raise RecipeError(
                f"pattern {self.pattern} removes {self.pattern.sparsity:g} of the weights, not "
                f"{self.sparsity:g}; leave --sparsity out or choose another pattern"
            )

    @classmethod
    def parse(cls, sparsity: float | None, pattern: str) -> Target:
        """From the command line's words: sparsity may be left out where the pattern implies it."""
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
        if not match:
            raise RecipeError(
                f"unknown pattern {pattern!r}; use 'unstructured' or N:M (N kept of M), e.g. 2:4"
            )
        nm = NM(int(match[1]), int(match[2]))
        return cls(nm.sparsity if sparsity is None else sparsity, nm)

    @property
    def pattern_name(self) -> str:
        return str(self.pattern) if self.pattern else "unstructured"

    def removed_of(self, count: int) -> int:
        """Weights removed out of `count`: floor, immune to 0.29 * 100 = 28.999…"""
        return math.floor(count * self.sparsity + 1e-9)


@dataclass(frozen=True)
class Pruned:
    """weight: [out, in] in the dtype it came in, zeros in place. report: figures for the manifest."""

    weight: Tensor
    report: dict[str, float] = field(default_factory=dict)


class WeightMethod(Protocol):
    """The shape of a module in ``methods/`` that prunes one linear at a time.

    Config: a frozen dataclass; the command line builds its options from the fields.
    NEEDS: the statistics to gather, of {"sq_sum", "gram"}; empty means no calibration data.
    """

    NEEDS: ClassVar[frozenset[str]]
    Config: Any

    def prune(
        self, weight: Tensor, stats: InputStats | None, target: Target, config: Any
    ) -> Pruned: ...
