"""What the methods of activation sparsity have in common: where gates stand, and the shape of a method.

A gate drops inputs of linears whose magnitude does not exceed a threshold: |x_j| > t / scale_j keeps
input j. Methods differ in where gates stand and in the scale, R-Sparse also in a low-rank branch for
what was dropped. One t for a gate; its share of dropped inputs follows from the calibration's quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.architectures import GatedMlp
    from llmsqueeze.numerics.histogram import MagnitudeHistogram


@dataclass(frozen=True)
class GateSpec:
    """Where one gate stands; names are those within a block.

    kind "input": on the tensor that enters linear `at`; "output": on what module `at` puts out.
    members: the linears that read it, by columns; rows: linears of which it makes as many outputs
    superfluous. companion: the linear whose outputs the gated values will be multiplied by.
    """

    kind: str
    at: str
    members: tuple[str, ...]
    rows: tuple[str, ...] = ()
    companion: str | None = None


@dataclass(frozen=True)
class BlockParts:
    """A block as a method sees it. groups: linears by the tensor they read, in the order of their calls."""

    groups: list[list[str]]
    mlp: GatedMlp | None


@dataclass(frozen=True)
class Branch:
    """A low-rank branch: up · down approximates the weights. sparse_ratio: R-Sparse's α.

    up: [out, rank] of the stacked members; down: [rank, in]; both None at α = 1. sparsity: the share
    of inputs that the gate then drops. fixed: α was asked for, so the branch stays, whatever it gains.
    """

    sparse_ratio: float
    sparsity: float
    up: Tensor | None
    down: Tensor | None
    fixed: bool = False


class ActivationMethod(Protocol):
    """The shape of a module that gates activations.

    gates: where; RecipeError when the block has no such place.
    scale: [in] fp32 from the members' weights, [out, in] each, and `companion`,
    [in] fp32, the mean magnitude (or root mean square, as companion_power 1 or 2 asks) of what the
    gated values will be multiplied by; None where the spec names no companion.
    A method with a low-rank branch also has `branch`.
    """

    Config: Any

    def gates(self, parts: BlockParts, config: Any) -> list[GateSpec]: ...

    def scale(
        self, spec: GateSpec, weights: list[Tensor], companion: Tensor | None, config: Any
    ) -> Tensor: ...


class BranchMethod(Protocol):
    """What a method with a low-rank branch has beside an ActivationMethod's functions."""

    def branch(
        self,
        weight: Tensor,
        scale: Tensor,
        x: Tensor,
        histogram: MagnitudeHistogram,
        sparsity: float,
        config: Any,
    ) -> Branch: ...


def input_gates(parts: BlockParts) -> list[GateSpec]:
    """A gate on every input of the block's linears."""
    return [GateSpec("input", names[0], tuple(names)) for names in parts.groups]


def column_norms(weights: list[Tensor], *, relative: bool = False) -> Tensor:
    """[in] fp32: Euclidean norms of the columns of the matrices, [out, in] each, stacked.

    relative: each matrix first divided by its own norm, so that one of small entries counts as much.
    """
    import torch

    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        squares = weight.float().square()
        total += squares.sum(dim=0) / (squares.sum() if relative else 1)
    return total.sqrt()
