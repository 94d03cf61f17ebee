"""TEAL: drop the inputs of smallest magnitude. Liu et al. (arXiv 2408.14690)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsqueeze.methods.gating import BlockParts, GateSpec, input_gates

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Config:
    pass


def gates(parts: BlockParts, config: Config) -> list[GateSpec]:
    """All inputs of all linears; those fed by one tensor share a gate."""
    return input_gates(parts)


def scale(
    spec: GateSpec, weights: list[Tensor], companion: Tensor | None, config: Config
) -> Tensor:
    """Ones. The threshold is a quantile of |x| itself: the published code assumes a mean of 0."""
    import torch

    return torch.ones(weights[0].shape[1], device=weights[0].device)
