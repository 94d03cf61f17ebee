"""Mixtures of experts taken apart: linears of their own instead of transformers' 3-D parameters.

An expert's linear is then a site like any other: it has a name, a 2-D weight and inputs, those of the tokens
that the router sends to it. What is loaded to run is put together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from llmsqueeze.architectures import Mixture
from llmsqueeze.errors import CheckpointError

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):  # type: ignore[misc]
    """down(activation(gate(x)) · up(x)), its linears named as `mixture` says."""

    def __init__(self, mixture: Mixture, fused: Any) -> None:
        super().__init__()
        _, hidden, inner = fused.down_proj.shape
        for name, out, width in (
            (mixture.gate, inner, hidden),
            (mixture.up, inner, hidden),
            (mixture.down, hidden, inner),
        ):
            linear = nn.Linear(width, out, bias=False, device="meta", dtype=fused.down_proj.dtype)
            self.add_module(name, linear)
        self.mixture = mixture
        self.act_fn = fused.act_fn

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x: [n, hidden]; tokens: [n], which ones of the batch they are, for hooks to see."""
        gate, up, down = self.linears
        y: Tensor = down(self.act_fn(gate(x)) * up(x))
        return y

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Gate, up and down."""
        names = self.mixture.gate, self.mixture.up, self.mixture.down
        gate, up, down = (self.get_submodule(name) for name in names)
        return gate, up, down


class Experts(nn.ModuleList):  # type: ignore[misc]
    """In place of transformers' module of all experts of a block, `fused`, whose parameters are empty.

    call_all: also experts that no token of a batch is routed to, so that all batches meet all linears.
    """

    def __init__(self, mixture: Mixture, fused: Any) -> None:
        super().__init__(Expert(mixture, fused) for _ in range(fused.down_proj.shape[0]))
        self._fused = (fused,)  # within a tuple torch does not take it for a child
        self.call_all = False

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden: [tokens, hidden]; index, weights: [tokens, chosen], the experts of every token."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, place = torch.where(index == number)
            if self.call_all or len(tokens):
                y = expert(hidden[tokens], tokens) * weights[tokens, place, None]
                # No token twice: the order of the sums does not matter.
                out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def fused(self) -> nn.Module:
        """transformers' module, with the weights of these experts."""
        gates, ups, downs = zip(*(expert.linears for expert in self), strict=True)
        pairs = zip(gates, ups, strict=True)
        module: Any = self._fused[0]
        module.gate_up_proj = nn.Parameter(
            torch.stack([torch.cat([gate.weight, up.weight]) for gate, up in pairs])
        )
        module.down_proj = nn.Parameter(torch.stack([down.weight for down in downs]))
        return module.train(self.training)


def take_apart(model: nn.Module, mixture: Mixture) -> None:
    """Give every expert of an empty model linears of its own, in place."""
    fused = [name for name, _ in model.named_modules() if name.endswith("." + mixture.module)]
    with no_init_weights():
        for name in fused:
            model.set_submodule(name, Experts(mixture, model.get_submodule(name)))


@torch.no_grad()
def put_together(model: nn.Module) -> None:
    """The opposite, with weights. Meanwhile those of one block are there twice.

    Raises CheckpointError where weights are not in memory.
    """
    for name in [name for name, _ in _mixtures(model)]:
        module = model.get_submodule(name)
        if any(parameter.is_meta for parameter in module.parameters()):
            raise CheckpointError(
                f"{name}: experts cannot be offloaded; load them to a device whole"
            )
        model.set_submodule(name, module.fused())


def call_all(model: nn.Module) -> None:
    """From here on every expert is called with every batch; see Experts."""
    for _, module in _mixtures(model):
        module.call_all = True


def expert_of(block: nn.Module, linear: str) -> Expert | None:
    """The expert that a linear belongs to, by its name within the block; None for any other linear."""
    owner = block.get_submodule(linear.rpartition(".")[0])
    return owner if isinstance(owner, Expert) else None


@dataclass(frozen=True)
class FusedPart:
    """The rows of a fused 3-D parameter that are one expert's `parameter`."""

    parameter: str
    index: int
    begin: int
    end: int


def fused_parts(model: nn.Module) -> dict[str, list[FusedPart]]:
    """What the parameters that were taken apart consist of, by their own names."""
    found: dict[str, list[FusedPart]] = {}
    for path, module in _mixtures(model):
        for index, expert in enumerate(module):
            names = expert.mixture.gate, expert.mixture.up, expert.mixture.down
            gate, up, down = (f"{path}.{index}.{name}.weight" for name in names)
            inner, hidden = expert.linears[0].weight.shape
            found.setdefault(f"{path}.{GATE_UP}", []).extend(
                [FusedPart(gate, index, 0, inner), FusedPart(up, index, inner, 2 * inner)]
            )
            found.setdefault(f"{path}.{DOWN}", []).append(FusedPart(down, index, 0, hidden))
    return found


def _mixtures(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            yield name, module
