"""Decoder layers like Llama's that read few tokens on a CPU by a handful of operators each.

What lies between the products of a small model costs more time than they do: every call of torch, every
module, and every time that threads wait for each other. Weights stay where they are, in the file if they lie
there. Passes over many tokens go the model's own way.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from llmsqueeze import stand_in
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import mlp, residual
from llmsqueeze.runtime.fused import FusedPart
from llmsqueeze.runtime.packed import (
    BitmaskLinear,
    DenseLinear,
    PackedLinear,
    StoredInt8Linear,
)

# Attention modules between whose projections there is a rotation, the cache and attention, and nothing else.
_ATTENTION = (LlamaAttention, MistralAttention, Qwen2Attention)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_KINDS = BitmaskLinear, DenseLinear, StoredInt8Linear, nn.Linear
_DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.int8
_NONE = torch.empty(0)


# Whether layers call the functions behind the operators themselves: torch takes longer to find them than some
# take to compute.
_direct = contextvars.ContextVar("direct", default=True)


@contextlib.contextmanager
def through_operators() -> Iterator[None]:
    """While this lasts, layers call operators, which torch's tools see."""
    token = _direct.set(False)
    try:
        yield
    finally:
        _direct.reset(token)


class _Group:
    """Linears of one input, as torch.ops.llmsqueeze.linears takes them."""

    def __init__(self, linears: list[Any]) -> None:
        parts = [_parts(linear) for linear in linears]
        self._lists = [list(each) for each in zip(*parts, strict=True)]
        self._ready = cpu.Group(*self._lists)
        biases = [_bias(linear) for linear in linears]
        self._bias = None if biases[0] is None else torch.cat(biases)

    def __call__(
        self, x: Tensor, norm: Any = None, residual: Tensor | None = None, *, glu: bool = False
    ) -> Tensor:
        """norm: the module that x goes through before."""
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        if _direct.get():
            return self._ready.product(x, weight, epsilon, self._bias, residual, glu)
        y: Tensor = torch.ops.llmsqueeze.linears(
            x, weight, epsilon, *self._lists, self._bias, residual, glu
        )
        return y


def _parts(linear: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, mask, row offsets and scale of a linear's rows."""
    product, rows = _rows(linear)
    if isinstance(product, BitmaskLinear):
        starts = product.row_offsets[rows.start : rows.stop + 1]
        return product.values, product.mask[rows], starts, _NONE
    if isinstance(product, StoredInt8Linear):
        return product.codes[rows], _NONE, _NONE, product.scale[rows]
    return product.weight.data[rows], _NONE, _NONE, _NONE


def _bias(linear: Any) -> Tensor | None:
    product, rows = _rows(linear)
    return None if product.bias is None else product.bias.data[rows]


def _rows(linear: Any) -> tuple[Any, slice]:
    """The module that has a linear's weights, and which rows of it they are."""
    if isinstance(linear, FusedPart):
        return linear.fused.product, slice(linear.begin, linear.end)
    return linear, slice(0, linear.out_features)


def join(model: nn.Module) -> int:
    """Let the layers that can read few tokens by operators alone; how many."""
    found = [layer for layer in model.modules() if _fits(layer)]
    for layer in found:
        layer.forward = _Steps(layer).forward
    return len(found)


def _fits(layer: Any) -> bool:
    """Whether it computes as Llama's layers do, with weights that the operators take."""
    if not residual.is_pre_norm(layer):
        return False
    attention, block = layer.self_attn, layer.mlp
    known = any(mlp.same_code(type(attention).forward, kind.forward) for kind in _ATTENTION)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    groups = [
        [getattr(attention, name, None) for name in _PROJECTIONS],
        [getattr(attention, "o_proj", None)],
        [getattr(block, name, None) for name in mlp.PAIR],
        [getattr(block, "down_proj", None)],
    ]
    return (
        known
        and mlp.is_swiglu(block)
        and all(mlp.same_code(type(norm).forward, LlamaRMSNorm.forward) for norm in norms)
        and all(_alike(group) for group in groups)
        and _bias(groups[2][0]) is None
        and any(isinstance(_rows(each)[0], PackedLinear) for group in groups for each in group)
    )


def _alike(linears: list[Any]) -> bool:
    """Whether they can be one group."""
    products = [_rows(linear)[0] for linear in linears if linear is not None]
    if len(products) < len(linears) or not all(type(each) in _KINDS for each in products):
        return False
    values = [_parts(linear)[0] for linear in linears]
    return (
        len({each.dtype for each in values}) == 1
        and values[0].dtype in _DTYPES
        and all(each.is_contiguous() for each in values)
        and len({_bias(linear) is None for linear in linears}) == 1
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (*linears, *products))
    )


class _Steps:
    """What a layer does with few tokens, from its weights as they were when it was made."""

    def __init__(self, layer: Any) -> None:
        attention, block = layer.self_attn, layer.mlp
        self._layer, self._whole = layer, layer.forward
        self._projections = _Group([getattr(attention, name) for name in _PROJECTIONS])
        self._out = _Group([attention.o_proj])
        self._pair = _Group([getattr(block, name) for name in mlp.PAIR])
        self._down = _Group([block.down_proj])
        self._width = width = attention.head_dim
        self._heads, self._kv_heads = (
            linear.out_features // width for linear in (attention.q_proj, attention.k_proj)
        )
        self._modules = [
            (owner._modules, name, module)
            for owner in (layer, attention, block)
            for name, module in owner._modules.items()
        ]

    def __deepcopy__(self, memo: Any) -> Any:
        # Addresses of weights are part of it: a copy would compute with those of the original.
        raise TypeError("a model that computes with kernels cannot be copied; load it again")

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
        rotation = options.get("position_embeddings")
        if (
            not _few(hidden_states)
            or rotation is None
            or rotation[0].shape[-1] != self._width
            or self._changed()
        ):
            y: Tensor = self._whole(hidden_states, attention_mask=attention_mask, **options)
            return y
        layer, width = self._layer, self._width
        attention, turning = layer.self_attn, self._heads + self._kv_heads
        batch, length, _ = hidden_states.shape
        every = self._projections(hidden_states, layer.input_layernorm)
        every = every.view(batch, length, turning + self._kv_heads, width)
        turned = _function("rotate")(every[:, :, :turning], *rotation).transpose(1, 2)
        q, k, v = turned[:, : self._heads], turned[:, self._heads :], every[:, :, turning:]
        v = v.transpose(1, 2)
        # By identity: a cache of no tokens is empty, and false.
        caches = [options.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((each for each in caches if each is not None), None)
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        seen = _attend(attention, q, k, v, attention_mask, options)
        hidden = self._out(seen.reshape(batch, length, self._heads * width), residual=hidden_states)
        return self._down(
            self._pair(hidden, layer.post_attention_layernorm, glu=True), residual=hidden
        )

    def _changed(self) -> bool:
        """Whether a module was replaced since, or someone watches one: they are not called here."""
        return any(
            held.get(name) is not module or module._forward_hooks or module._forward_pre_hooks
            for held, name, module in self._modules
        )


def _function(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(cpu if _direct.get() else torch.ops.llmsqueeze, name)
    return found


def _few(x: Tensor) -> bool:
    """Whether operators take so many tokens as they are, and nobody wants to differentiate."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.numel() <= cpu.most_tokens(x.dtype) * x.shape[-1]
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> Tensor:
    """[batch, tokens, heads, width], by our own operator where it can, else by the model's function."""
    name = module.config._attn_implementation
    if name == "sdpa" and isinstance(mask, Tensor | None) and cpu.attend_fits(q, k, v, mask):
        y: Tensor = _function("attend")(q, k, v, mask, _NONE, module.scaling)
        return y
    function = stand_in.function_of(name, module)
    found, _ = function(module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **options)
    return found  # type: ignore[no-any-return]
