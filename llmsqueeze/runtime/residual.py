"""Decoder layers whose projections add the residual themselves: no kernel of its own, one rounding less."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
)

from llmsqueeze.runtime.mlp import PackedMLP, same_code


class AddingLinear(nn.Module):  # type: ignore[misc]
    """A projection that adds what its layer left in `residual`, once."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.residual: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        residual, self.residual = self.residual, None
        y: Tensor = self.linear(x, residual)
        return y


def join(model: nn.Module, can_add: Callable[[nn.Module], bool]) -> None:
    """Let layers add residuals in their projections, where both of a layer can."""
    for layer in model.modules():
        if not is_pre_norm(layer):
            continue
        ends = (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")
        if all(can_add(getattr(owner, name, layer)) for owner, name in ends):
            for owner, name in ends:
                setattr(owner, name, AddingLinear(getattr(owner, name)))
            layer.forward = _forward(layer)


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether a module computes h + attention(norm(h)), then h + mlp(norm(h)), as Llama's layers do.

    And whether attention and MLP return what their last projection puts out.
    """
    if not same_code(type(layer).forward, LlamaDecoderLayer.forward) or "forward" in vars(layer):
        return False
    attention, block = layer.self_attn, layer.mlp
    ends_alike = _from(type(attention).forward, "o_proj") == _from(LlamaAttention.forward, "o_proj")
    plain = isinstance(block, PackedMLP) or same_code(type(block).forward, LlamaMLP.forward)
    own = [m for m in (attention, block) if m._forward_hooks or "forward" in vars(m)]
    return ends_alike and plain and not own


def _from(function: Callable[..., Any], name: str) -> list[tuple[str, str]]:
    """The instructions of a function from its last use of a name."""
    found = [(step.opname, step.argrepr) for step in dis.get_instructions(inspect.unwrap(function))]
    last = max((i for i, (_, what) in enumerate(found) if name in what), default=len(found))
    return found[last:]


def _forward(layer: Any) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        layer.self_attn.o_proj.residual = hidden_states
        normed = layer.input_layernorm(hidden_states)
        hidden_states, _ = layer.self_attn(hidden_states=normed, **options)
        layer.mlp.down_proj.residual = hidden_states
        y: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return y

    return forward
