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


# Share of the inputs that N:M along outputs keeps whole, and of those it drops for that.
DEFAULT_BUDGET = 0.02


@dataclass(frozen=True)
class NM:
    """n kept of every m consecutive weights. (The Wanda code counts n *removed*.)

    axis: "in", along the inputs of a row, what hardware 2:4 means; "out", along the outputs fed by
    one input, what a kernel can combine with activation sparsity.
    budget ("out" only): this fraction of the inputs, the most important, stays dense, and as many of
    the least important are dropped: the bytes are those without a budget.
    """

    n: int
    m: int
    axis: str = "in"
    budget: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 64:
            raise RecipeError(f"pattern {self.n}:{self.m}: n of m needs 0 < n < m <= 64, as in 2:4")
        if not 0 <= self.budget <= 0.5:
            raise RecipeError(f"channel budget {self.budget} is outside [0, 0.5]")
        if self.budget and (self.axis != "out" or 2 * self.n != self.m):
            raise RecipeError(
                f"a channel budget needs half of each group, as in 2:4-out, not {self}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("-out" if self.axis == "out" else "")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a [rows, columns] weight cannot take this pattern; None if it can."""
        extent, what = (rows, "outputs") if self.axis == "out" else (columns, "inputs")
        return f"pattern {self} does not divide the {extent} {what}" if extent % self.m else None


@dataclass(frozen=True)
class Tile:
    """PATCH: square tiles of `size` weights, each dense or 2:4 (arXiv 2509.23410). Edge tiles are ragged."""

    size: int = 128
    inner: ClassVar[NM] = NM(2, 4)

    def __post_init__(self) -> None:
        if self.size < 4 or self.size % 4:
            raise RecipeError(f"tiles of {self.size}: the size must be a multiple of 4, as in 128")

    def __str__(self) -> str:
        return "tile"

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a [rows, columns] weight cannot take this pattern; None if it can."""
        return self.inner.misfit(rows, columns)

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a [rows, columns] weight, ragged ones included."""
        return -(-rows // self.size) * -(-columns // self.size)


@dataclass(frozen=True)
class Target:
    """How much to remove from a site, and in which shape.

    sparsity: fraction removed, in [0, 1). pattern: None ranks freely (unstructured).
    dense_tiles: how many tiles of this site stay dense; None follows from the sparsity.
    """

    sparsity: float
    pattern: NM | Tile | None = None
    dense_tiles: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and 0 <= self.sparsity < 1):
            raise RecipeError(
                f"sparsity {self.sparsity} is outside [0, 1): it is the fraction of weights to "
                "remove, for example 0.5"
            )
        if isinstance(self.pattern, Tile) and self.sparsity > 0.5:
            raise RecipeError(f"tiles are dense or 2:4, so at most 0.5 goes, not {self.sparsity}")
        if isinstance(self.pattern, NM) and not math.isclose(
            self.sparsity, self.pattern.sparsity, abs_tol=1e-9
        ):
            raise RecipeError(
                f"pattern {self.pattern} removes {self.pattern.sparsity:g} of the weights, not "
                f"{self.sparsity:g}; leave --sparsity out or choose another pattern"
            )

    @classmethod
    def parse(
        cls,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        *,
        tile: int = 128,
        budget: float | None = None,
    ) -> Target:
        """From the command line's words: sparsity may be left out where the pattern implies it.

        budget None: DEFAULT_BUDGET where the pattern can have one.
        """
        if pattern == "unstructured":
            return cls(0.5 if sparsity is None else sparsity)
        if pattern == "tile":
            return cls(0.35 if sparsity is None else sparsity, Tile(tile))
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})(-out)?", pattern)
        if not match:
            raise RecipeError(
                f"unknown pattern {pattern!r}; use unstructured, N:M (N kept of M), e.g. 2:4, "
                "N:M-out or tile"
            )
        n, m, axis = int(match[1]), int(match[2]), "out" if match[3] else "in"
        if budget is None:
            budget = DEFAULT_BUDGET if axis == "out" and 2 * n == m else 0.0
        nm = NM(n, m, axis, budget)
        return cls(nm.sparsity if sparsity is None else sparsity, nm)

    @property
    def pattern_name(self) -> str:
        return str(self.pattern) if self.pattern else "unstructured"

    def removed_of(self, count: int) -> int:
        """Weights removed out of `count`: floor, immune to 0.29 * 100 = 28.999…"""
        return math.floor(count * self.sparsity + 1e-9)

    def dense_of(self, tiles: int) -> int:
        """Dense tiles out of `tiles` equal ones: s = (1 - dense share) / 2."""
        return (
            round(tiles * (1 - 2 * self.sparsity)) if self.dense_tiles is None else self.dense_tiles
        )


@dataclass(frozen=True)
class Pruned:
    """weight: [out, in] in the dtype it came in, zeros in place. keep: bool, True where it stays.

    report: figures for the manifest.
    """

    weight: Tensor
    keep: Tensor
    report: dict[str, float] = field(default_factory=dict)


class WeightMethod(Protocol):
    """The shape of a module in ``methods/`` that prunes one linear at a time.

    Config: a frozen dataclass; the command line builds its options from the fields.
    needs: the statistics to gather, of InputStats; empty means no calibration data.
    prune: raises CalibrationError when the statistics cannot be used.
    """

    Config: Any

    def needs(self, config: Any) -> frozenset[str]: ...

    def prune(
        self, weight: Tensor, stats: InputStats | None, target: Target, config: Any
    ) -> Pruned: ...


class RefitMethod(Protocol):
    """The shape of a module that changes the weights a mask left, and not the mask."""

    Config: Any

    def needs(self, config: Any) -> frozenset[str]: ...

    def refit(self, weight: Tensor, pruned: Pruned, stats: InputStats, config: Any) -> Pruned: ...


class AllocationMethod(Protocol):
    """The shape of a module that says how much goes where, from one look at the dense model.

    needs: the statistics of the dense model; empty means no calibration data.
    measure: one block's sites, [out, in] weights and statistics; only what it returns is kept.
    assign: a target for every site, whose mean weighted by parameters is that of `target`; measured
    and shapes, (out, in) of the sites, come block by block.
    Both raise RecipeError where the target's pattern leaves nothing to allocate.
    """

    Config: Any

    def needs(self, config: Any) -> frozenset[str]: ...

    def measure(
        self, sites: dict[str, tuple[Tensor, InputStats | None]], target: Target, config: Any
    ) -> Any: ...

    def assign(
        self,
        measured: list[Any],
        shapes: list[dict[str, tuple[int, int]]],
        target: Target,
        config: Any,
    ) -> dict[str, Target]: ...
