"""WINA: drop the inputs of smallest |x_j|·‖W_:j‖. Chen et al. (arXiv 2505.19427), without its rotation.

If the columns of W were orthogonal this would be the best choice of so many inputs. The published code
makes them so by rotating the residual stream, at the cost of two dense matrices a block; there only k
and gate use the norms. Here every gate does, with the norms of all linears that it feeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.methods.gating import BlockParts, GateSpec, column_norms, input_gates

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Config:
    wina_relative: bool = field(
        default=False,
        metadata={"help": "count every linear behind a gate alike, however small its weights"},
    )


def gates(parts: BlockParts, config: Config) -> list[GateSpec]:
    """All inputs of all linears; those fed by one tensor share a gate."""
    return input_gates(parts)


def scale(
    spec: GateSpec, weights: list[Tensor], companion: Tensor | None, config: Config
) -> Tensor:
    """‖W_:j‖ of the stacked members."""
    return column_norms(weights, relative=config.wina_relative)
