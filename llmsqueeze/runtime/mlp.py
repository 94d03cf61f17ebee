"""MLPs whose gate and up projections are one product, with the activation in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from llmsqueeze.ops import swiglu
from llmsqueeze.runtime.packed import GatedProduct, PackedLinear

PAIR = "gate_proj", "up_proj"


class PackedMLP(nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) · up(x)), all but down one product."""

    def __init__(self, product: PackedLinear | GatedProduct, down_proj: nn.Module) -> None:
        super().__init__()
        self.product = product
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self._hidden(x))
        return y

    def _hidden(self, x: Tensor) -> Tensor:
        product: Any = self.product
        if isinstance(product, PackedLinear) or product.gate.whole(x):
            hidden: Tensor = product(x)
            return hidden
        kept, side = product.gate.split(x)
        product.gate.release()
        both = product.rows(kept, 0, product.out_features, product.bias)
        return swiglu(both if side is None or product.up is None else both + side @ product.up.t())


def same_code(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions were compiled from the same statements."""
    codes = [inspect.unwrap(function).__code__ for function in (one, other)]
    return len({(code.co_code, code.co_names) for code in codes}) == 1


def is_swiglu(owner: nn.Module) -> bool:
    """Whether a module computes down(silu(gate(x)) · up(x)), as Llama's MLP and many others do."""
    names = set(dict(owner.named_children()))
    return (
        same_code(type(owner).forward, LlamaMLP.forward)
        and names == {*PAIR, "down_proj", "act_fn"}
        and isinstance(owner.act_fn, (nn.SiLU, SiLUActivation))
        and owner.gate_proj.out_features == owner.up_proj.out_features
        and owner.gate_proj.out_features % 8 == 0
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (owner, owner.act_fn))
        and "forward" not in vars(owner)
    )
