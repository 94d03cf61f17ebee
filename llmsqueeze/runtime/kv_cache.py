"""A cache for transformers whose keys and values lie packed: every token is quantised as it comes.

What attention sees is always read back from the packed form, the newest token included, so a single
forward pass over a text measures what decoding it token by token would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from llmsqueeze.errors import RecipeError
from llmsqueeze.numerics.codebook import nearest, normal_codebook, pack_codes, unpack_codes
from llmsqueeze.numerics.hadamard import hadamard

METHODS = ("fp8", "rotate")
ROTATE_BITS = (2, 3, 4)
FP8_MAX = 448.0  # of e4m3


@dataclass(frozen=True)
class KvFormat:
    """method: fp8, or rotate with `bits`, 2 to 4. Both need no calibration.

    fp8: e4m3, scaled by the largest magnitude of every token and head. rotate: the vector of every token
    and head turned by a Hadamard matrix, after which its entries are nearly normal, then coded by the best
    values for a normal distribution (TurboQuant, arXiv 2504.19874, without its residual) and a scale.
    """

    method: str
    bits: int

    def __post_init__(self) -> None:
        allowed = (8,) if self.method == "fp8" else ROTATE_BITS
        if self.method not in METHODS or self.bits not in allowed:
            raise RecipeError(f"{self} is no KV-cache format; use fp8, or rotate:4, :3 or :2")

    @classmethod
    def parse(cls, text: str) -> KvFormat:
        """fp8 or rotate:BITS; RecipeError on anything else."""
        method, _, bits = text.partition(":")
        if text == "fp8":
            return cls("fp8", 8)
        if method == "rotate" and bits in map(str, ROTATE_BITS):
            return cls(method, int(bits))
        raise RecipeError(f"unknown KV-cache format {text!r}; use fp8, or rotate:4, :3 or :2")

    def __str__(self) -> str:
        return "fp8" if self.method == "fp8" else f"{self.method}:{self.bits}"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., bytes] (uint8, or e4m3) and scales [..., 1] fp16 of [..., D]."""
        x = x.float()
        if self.method == "fp8":
            # The scale is used as it is stored, and never 0: it divides.
            scale = (x.abs().amax(dim=-1, keepdim=True) / FP8_MAX).half().clamp_min(_TINY)
            return (x / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
        turned = hadamard(x)
        codebook = normal_codebook(self.bits).to(x)
        power = turned.square().mean(dim=-1, keepdim=True).sqrt()
        codes = nearest(turned / power.clamp_min(_TINY), codebook)
        # The scale that brings the coded vector nearest to the true one.
        coded = codebook[codes.long()]
        scale = (turned * coded).sum(-1, keepdim=True) / coded.square().sum(-1, keepdim=True)
        return pack_codes(codes, self.bits), scale.half()

    def decode(self, codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """[..., width] in `dtype`: what encode's results stand for. Computed in fp32."""
        if self.method == "fp8":
            return (codes.float() * scale.float()).to(dtype)
        codebook = normal_codebook(self.bits).float().to(codes.device)
        turned = codebook[unpack_codes(codes, self.bits, width).long()] * scale.float()
        return hadamard(turned).to(dtype)

    def bits_per_element(self, width: int) -> float:
        """Stored bits by key or value entry, scales and padding included."""
        codes = width if self.method == "fp8" else -(-width // 8) * self.bits
        return 8 * (codes + torch.finfo(torch.float16).bits // 8) / width


_TINY = float(torch.finfo(torch.float16).smallest_normal)


class PackedLayer(DynamicLayer):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of one layer, packed: [batch, heads, tokens, …] in all parts.

    It offers what DynamicLayer offers; `keys` and `values` hold the codes.
    """

    def __init__(self, format: KvFormat) -> None:
        super().__init__()
        self.format = format

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self.widths = (key_states.shape[-1], value_states.shape[-1])
        self.keys, self.key_scales = self.format.encode(key_states[..., :0, :])
        self.values, self.value_scales = self.format.encode(value_states[..., :0, :])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, tokens, width] each; returns all keys and values as they lie packed."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        added = (*self.format.encode(key_states), *self.format.encode(value_states))
        self._replace(
            [torch.cat([old, new], dim=-2) for old, new in zip(self._parts(), added, strict=True)]
        )
        keys, key_scales, values, value_scales = self._parts()
        decode = self.format.decode
        return (
            decode(keys, key_scales, self.widths[0], self.dtype),
            decode(values, value_scales, self.widths[1], self.dtype),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as everywhere in transformers, their number is given negative."""
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative number")
        if tokens_to_remove and self.is_initialized:
            self._each(lambda part: part[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._each(lambda part: part[indices.to(part.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Forget every token."""
        self.is_initialized = False
        self.keys = self.values = None

    @property
    def elements(self) -> int:
        """Key and value entries held."""
        if not self.is_initialized:
            return 0
        return self.key_scales.numel() * self.widths[0] + self.value_scales.numel() * self.widths[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for them."""
        if not self.is_initialized:
            return 0
        return sum(part.untyped_storage().nbytes() for part in self._parts())

    def _parts(self) -> list[Tensor]:
        return [self.keys, self.key_scales, self.values, self.value_scales]

    def _replace(self, parts: list[Tensor]) -> None:
        self.keys, self.key_scales, self.values, self.value_scales = parts

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        # Indexing and repeating are not there for float8 on every device; bytes are the same to them.
        self._replace([change(p.view(torch.uint8)).clone().view(p.dtype) if p.itemsize == 1
                       else change(p).clone() for p in self._parts()])  # fmt: skip


def packed_cache(config: PretrainedConfig, format: KvFormat) -> DynamicCache:
    """A cache for a model of this config, full-attention layers packed, the others transformers' own.

    RecipeError when no layer is one of full attention.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if not cache.layers:  # a config without layer types: all are of full attention
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    cache.layers = [
        PackedLayer(format) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if not any(isinstance(layer, PackedLayer) for layer in cache.layers):
        raise RecipeError("this model has no layer of full attention, whose cache could be packed")
    return cache


def bits_per_element(cache: DynamicCache) -> float:
    """Bits allocated by key or value entry, over the packed layers; those must hold tokens."""
    packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    return 8 * sum(layer.nbytes for layer in packed) / sum(layer.elements for layer in packed)
