"""CHESS: gate the activation function's output by channel. He et al. (arXiv 2409.01366).

In y = W_down (g ⊙ u), g = act(W_gate x), u = W_up x, dropping g_i makes row i of W_up and column i of
W_down superfluous. It costs g_i u_i, of which u_i is not known beforehand: its mean magnitude over the
calibration tokens stands in. In attention the inputs of q and o are gated by magnitude alone; k and v
stay dense, since what they get wrong stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.gating import BlockParts, GateSpec, column_norms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Config:
    chess_attention: bool = field(
        default=True, metadata={"help": "also gate the inputs of q and o (the paper's CHESS with)"}
    )
    chess_down_norms: bool = field(
        default=False,
        metadata={
            "help": "weigh each channel by its column norm in down_proj as well; not the paper's"
        },
    )


def gates(parts: BlockParts, config: Config) -> list[GateSpec]:
    """The activation function's output, and q's and o's inputs."""
    mlp = parts.mlp
    if mlp is None:
        raise RecipeError(
            "chess gates the activation function of a gated MLP (gate, up and down as linears of "
            "their own), which this architecture does not have; use teal or wina"
        )
    found = [
        GateSpec("output", mlp.activation, (mlp.down,), rows=(mlp.up,), companion=mlp.up),
    ]
    if config.chess_attention:
        found = [GateSpec("input", n, (n,)) for n in (mlp.query, mlp.attention_out)] + found
    return found


def scale(
    spec: GateSpec, weights: list[Tensor], companion: Tensor | None, config: Config
) -> Tensor:
    """E|u_i| of the MLP's gate, ones elsewhere."""
    import torch

    if companion is None:
        return torch.ones(weights[0].shape[1], device=weights[0].device)
    return companion * column_norms(weights) if config.chess_down_norms else companion
