"""A cache for transformers whose keys and values lie packed: every token is quantised as it comes.

What attention sees is always read back from the packed form, the newest token included, so a single
forward pass over a text measures what decoding it token by token would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.kv_record import KvRecord
from llmsqueeze.methods import CALIBRATED_KV, KV_BITS
from llmsqueeze.numerics.feedback import Feedback
from llmsqueeze.numerics.hadamard import hadamard
from llmsqueeze.numerics.kv_codecs import (
    ChannelCodec,
    Codebook,
    Codec,
    Fp8,
    Rotated,
    TokenCodec,
)
from llmsqueeze.numerics.rope import rotate, unrotate
from llmsqueeze.runtime import turned
from llmsqueeze.runtime.positions import Positions, rope_of
from llmsqueeze.runtime.spans import Span, coded_spans


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is packed. sinks: first positions of every row that are kept in 16 bits beside."""

    keys: Codec
    values: Codec
    sinks: int = 0

    def to(self, device: torch.device) -> LayerFormat:
        return LayerFormat(self.keys.to(device), self.values.to(device), self.sinks)

    def bits_per_element(self, heads: int, width: int) -> float:
        """Stored bits by key or value entry, sinks and positions aside."""
        both = self.keys.bits_per_element(heads, width), self.values.bits_per_element(heads, width)
        return sum(both) / 2


def parse_format(text: str) -> LayerFormat:
    """fp8 or rotate:BITS; RecipeError on anything else."""
    method, _, bits = text.partition(":")
    if text == "fp8":
        return LayerFormat(Fp8(), Fp8())
    if method == "rotate" and bits in map(str, KV_BITS[method]):
        return LayerFormat(Rotated(int(bits)), Rotated(int(bits)))
    raise RecipeError(f"unknown KV-cache format {text!r}; use fp8, or rotate:4, :3 or :2")


def stored_formats(record: KvRecord, tensors: Mapping[str, Tensor]) -> dict[int, LayerFormat]:
    """Layer → format, of a checkpoint's record and tensors."""
    if record.method != CALIBRATED_KV:
        name = record.method if record.method == "fp8" else f"{record.method}:{record.bits}"
        return dict.fromkeys(record.layers, parse_format(name))
    formats = {}
    for layer in record.layers:
        part = {name: tensors[f"{layer}.{name}"] for name in _PARTS}
        feedback = None
        if record.rank:
            diagonal, factors = (tensors[f"{layer}.key_{n}"] for n in ("diagonal", "factors"))
            feedback = Feedback.of(diagonal, factors)
        keys = ChannelCodec(
            Codebook(record.bits, part["key_encode"].double(), part["key_decode"].double()),
            part["key_offset"].float()[:, None],
            part["key_scale"].float()[:, None],
            record.key_slots,
            feedback,
        )
        book = Codebook(record.bits, part["value_encode"].double(), part["value_decode"].double())
        values = TokenCodec(book, record.value_slots, record.turned)
        formats[layer] = LayerFormat(keys, values, record.sinks)
    return formats


_PARTS = ("key_offset", "key_scale", "key_encode", "key_decode", "value_encode", "value_decode")


class PackedLayer(DynamicLayer):  # type: ignore[misc]  # untyped in transformers
    """Keys and values of one layer, packed.

    It offers what DynamicLayer offers; `keys` and `values` hold the codes. positions: shared by the
    layers of a cache, needed for keys that are coded before the rotary embedding and for sinks; owner:
    this is the layer that keeps them up to date, the first that is packed. config: of the model, whose
    attention may compute with turned keys and values, see runtime.turned. window: of sliding attention,
    whose last tokens alone are kept; 0: all are.
    """

    def __init__(
        self,
        format: LayerFormat,
        positions: Positions | None = None,
        owner: bool = False,
        config: PretrainedConfig | None = None,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.window, self.is_sliding = window, bool(window)
        self._seen = 0
        self._marks: list[turned.Mark] = []
        self.format = format
        self.positions = positions
        self.owner = owner
        self._parts: list[list[Tensor]] = [[], []]
        self._sinks: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self.widths = (key_states.shape[-1], value_states.shape[-1])
        codecs = self.format.keys, self.format.values
        for side, codec in enumerate(codecs):
            empty = (key_states, value_states)[side][..., :0, :]
            self._parts[side] = list(codec.encode(empty))
        self.keys, self.values = self._parts[0][0], self._parts[1][0]
        if self.format.sinks:
            kept = self.dtype if self.dtype.itemsize == 2 else torch.bfloat16
            self._sinks = [
                x.new_zeros(*x.shape[:2], self.format.sinks, x.shape[3], dtype=kept)
                for x in (key_states, value_states)
            ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, tokens, width] each; returns all keys and values as they lie packed."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        if self.positions and self.owner:
            self.positions.append(batch, length, self.device)
        arriving = key_states
        if self.format.keys.pre_rope and self.positions and self.positions.rope:
            arriving = unrotate(key_states.float(), *self.positions.newest())
        added = self.format.keys.encode(arriving), self.format.values.encode(value_states)
        for side in (0, 1):
            old = self._parts[side]
            self._parts[side] = [
                torch.cat([o, n], dim=-2) for o, n in zip(old, added[side], strict=True)
            ]
        self._seen += length
        self._show()
        if self.format.sinks:
            self._keep_sinks(key_states, value_states)
        found = self._read()
        if self.window:
            slid = max(self.keys.shape[-2] - self.window + 1, 0)
            self._each(lambda part: part[..., slid:, :])
        return found

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.keys.shape[-2] if self.is_initialized else 0
        return held + query_length, self._seen - held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as everywhere in transformers, their number is given negative."""
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative number")
        if tokens_to_remove and self.is_initialized:
            if self.window and self._seen >= self.window:
                raise RuntimeError("tokens that slid out of the window are not there to come back")
            self._seen = max(self._seen + tokens_to_remove, 0)
            self._each(lambda part: part[..., :tokens_to_remove, :])
            self._move(lambda ids: ids[:, :tokens_to_remove])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda part: part[indices.to(part.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Forget every token."""
        self.is_initialized = False
        self.keys = self.values = None
        self._seen = 0
        self._parts, self._sinks = [[], []], []
        if self.positions and self.owner:
            self.positions.change(None)

    @property
    def elements(self) -> int:
        """Key and value entries held."""
        if not self.is_initialized:
            return 0
        return sum(
            parts[0].shape[:3].numel() * width
            for parts, width in zip(self._parts, self.widths, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for them: codes, scales, outliers, sinks, and positions with their owner."""
        if not self.is_initialized:
            return 0
        held = [*self._parts[0], *self._parts[1], *self._sinks]
        if self.positions and self.owner and self.positions.ids is not None:
            held.append(self.positions.ids)
        return sum(part.untyped_storage().nbytes() for part in held)

    def _read(self) -> tuple[Tensor, Tensor]:
        if not all(mark.seen for mark in self._marks):
            raise RuntimeError(
                "this model's attention did not see that its keys or values are turned; choose another "
                "with model.set_attn_implementation('sdpa') behind llmsqueeze.kv_cache(model)"
            )
        keys_format, values_format = self.format.keys, self.format.values
        pre_rope = bool(keys_format.pre_rope and self.positions and self.positions.rope)
        back = self.config is None or not turned.accepted(self.config)
        dtype = torch.float32 if pre_rope else self.dtype
        parts, widths = self._parts, self.widths
        keys = keys_format.decode(tuple(parts[0]), widths[0], dtype, turn_back=back)
        if pre_rope:
            assert self.positions is not None
            keys = rotate(keys, *self.positions.all(self.dtype)).to(self.dtype)
        values = values_format.decode(tuple(parts[1]), widths[1], self.dtype, turn_back=back)
        are_turned = [codec.turned and not back for codec in (keys_format, values_format)]
        if self.format.sinks:
            assert self.positions is not None
            rows, tokens, slots = self.positions.first(self.format.sinks)
            for x, kept, turn in zip((keys, values), self._sinks, are_turned, strict=True):
                exact = kept[rows, :, slots].to(x.dtype)
                x[rows, :, tokens] = hadamard(exact) if turn else exact
        pairs = zip((keys, values), are_turned, strict=True)
        self._marks = [turned.mark(x) for x, turn in pairs if turn]
        return keys, values

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Copy what stands at the first positions."""
        assert self.positions is not None
        for slot, rows, places in self.positions.arrived(self.format.sinks):
            for x, kept in zip((keys, values), self._sinks, strict=True):
                kept[rows, :, slot] = x[rows, :, places].to(kept.dtype)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._each(change)
            self._sinks = [change(part) for part in self._sinks]
            self._move(change)

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.positions and self.owner and self.positions.ids is not None:
            self.positions.change(change(self.positions.ids).clone())

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        # Indexing and repeating are not there for float8 on every device; bytes are the same to them.
        self._parts = [
            [
                change(p.view(torch.uint8)).clone().view(p.dtype)
                if p.dtype == torch.float8_e4m3fn
                else change(p).clone()
                for p in side
            ]
            for side in self._parts
        ]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._parts[0][0], self._parts[1][0]


def attach(model: nn.Module, formats: Mapping[int, LayerFormat]) -> None:
    """Remember how a model's cache is to be packed, for attached_cache."""
    model.llmsqueeze_kv_formats = dict(formats)  # type: ignore[assignment]


def attached_cache(model: nn.Module) -> DynamicCache:
    """A new cache as the model's checkpoint says; RecipeError when it says nothing."""
    return packed_cache(model, attached_formats(model))


def attached_formats(model: nn.Module) -> dict[int, LayerFormat]:
    """Layer → format of the model's checkpoint, on its device; RecipeError when it says nothing."""
    formats: Any = getattr(model, "llmsqueeze_kv_formats", None)
    if not formats:
        raise RecipeError("this model's checkpoint has no KV-cache format; run quantize-kv on it")
    device = next(model.parameters()).device
    if getattr(model, "llmsqueeze_kv_device", None) != device:
        formats = {layer: format.to(device) for layer, format in formats.items()}
        model.llmsqueeze_kv_formats, model.llmsqueeze_kv_device = formats, device  # type: ignore[assignment]
    return dict(formats)


def packed_cache(model: nn.Module, format: LayerFormat | Mapping[int, LayerFormat]) -> DynamicCache:
    """A cache for a model, layers of full and sliding attention packed, the others transformers' own.

    format: of all of them, or by layer. RecipeError when there is no such layer.
    """
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    config = config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if not cache.layers:  # a config without layer types: all are of full attention
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    known = coded_spans(config)
    formats = dict(format) if isinstance(format, Mapping) else dict.fromkeys(known, format)
    if stray := set(formats) - set(known):
        raise CheckpointError(
            f"layer {min(stray)} of this model has no cache of full or sliding attention"
        )
    placed = any(f.sinks or f.keys.pre_rope for f in formats.values())
    owned: dict[Span, Positions] = {}
    for index in sorted(formats):
        span = known[index]
        owner = span not in owned
        if placed and owner:
            owned[span] = Positions(rope_of(model), span.kind, span.window)
        positions = owned.get(span)
        layer = PackedLayer(formats[index], positions, owner and placed, config, span.window)
        cache.layers[index] = layer
    if any(f.keys.turned or f.values.turned for f in formats.values()):
        turned.accept(config)
    return cache


def bits_per_element(cache: DynamicCache) -> float:
    """Bits allocated by key or value entry, over the packed layers; those must hold tokens."""
    packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    return 8 * sum(layer.nbytes for layer in packed) / sum(layer.elements for layer in packed)
