"""A cache of fixed size whose keys and values lie as a kernel reads them: coded, in tiles.

Decoding codes every new token into its tile and attends over the tiles; nothing is ever unpacked. A prompt
attends to its own keys and values as they are, and is coded afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import kv_constants, kv_tiles
from llmsqueeze.numerics.kv_codecs import ChannelCodec
from llmsqueeze.numerics.kv_constants import Angles
from llmsqueeze.numerics.kv_tiles import TOKENS, TileFormat
from llmsqueeze.numerics.rope import unrotate
from llmsqueeze.ops.packed_append import coding_angles, encoding_books, feedback_constants
from llmsqueeze.runtime.kv_cache import LayerFormat
from llmsqueeze.runtime.positions import Rope, rope_of

# Tokens of a prompt that are coded at a time: fp64 intermediates of more would be large.
_AT_ONCE = 2048


class Hub:
    """Where a cache tells the attention that is called next that its keys lie in tiles. One to a model.

    prompt: that it took a prompt, whose attention may hide nothing but what is to come.
    """

    def __init__(self) -> None:
        self.active: TiledLayer | None = None
        self.prompt = False


@dataclass
class Shared:
    """What the layers of a cache have in common. length: [1] int32, cached tokens; seen: the same as a
    number, but for steps that were compiled or that a CUDA graph replays; cos, sin: [tokens, R] fp32 of
    every position, None for keys that are coded after the rotary embedding."""

    hub: Hub
    length: Tensor
    counters: Tensor
    cos: Tensor | None
    sin: Tensor | None
    seen: int = 0


class TiledLayer(CacheLayerMixin):  # type: ignore[misc]  # untyped in transformers
    """One layer. capacity: tokens; owner: this layer counts them, the first that is called."""

    # What transformers' generate would compile by itself; Decoder does where it is asked to.
    is_compileable = False
    is_sliding = False

    def __init__(
        self, format: LayerFormat, shared: Shared, capacity: int, rotary: int, owner: bool
    ) -> None:
        super().__init__()
        self.format, self.shared, self.owner = format, shared, owner
        self.max_cache_len = -(-capacity // TOKENS) * TOKENS
        self.rotary = rotary
        self.filled = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        device = key_states.device
        keys, values = (codec.to(device) for codec in (self.format.keys, self.format.values))
        if value_states.shape[-1] != width:
            raise EnvironmentFault("no kernel attends over keys and values of different widths")
        self.form, self.codecs = _form(self.format, width, self.rotary), (keys, values)
        self.tiles = self.form.empty(batch, heads, self.max_cache_len, device)
        self.sinks: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if self.format.sinks:
            # Two allocations: of views into one, torch.compile (2.11) copied the second from beyond its end.
            shape = batch, heads, self.format.sinks, width
            self.sinks = key_states.new_zeros(shape), key_states.new_zeros(shape)
        self._attending, self._coding = self._constants(device)
        self.keys, self.values = self.tiles, self.tiles
        self.device, self.dtype = device, key_states.dtype
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache [batch, kv heads, tokens, D]; returns them, for what attends to a prompt."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if self.shared.hub.active is not None:
            raise RuntimeError(
                "this model's attention did not look at what it cached; choose another with "
                "model.set_attn_implementation('sdpa') before its decoder is made"
            )
        if self.owner:
            if not torch.compiler.is_compiling():  # it would compile anew for another number
                self._count(count)
            self.shared.length.add_(count)
        if count > 1:
            self._fill(key_states, value_states)
            return key_states, value_states
        torch.ops.llmsqueeze.kv_append(
            key_states, value_states, self.tiles, self.shared.length, None, *self._coding,
            *self.sinks, self.form.arguments(),
        )  # fmt: skip
        self.shared.hub.active = self
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """[batch, 1, heads, D] of the newest token's queries [batch, heads, 1, D]."""
        y: Tensor = torch.ops.llmsqueeze.kv_attend(
            query, self.tiles, self.shared.length, None, *self._attending, *self.sinks,
            self.shared.counters, self.form.arguments(), 0, scale,
        )  # fmt: skip
        return y

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a prompt: it is all there is. Decoding needs no mask."""
        return query_length, 0

    def get_seq_length(self) -> Any:
        return self.shared.length[0]

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # before transformers 5.24

    def reset(self) -> None:
        """Forget every token; what is allocated stays where it is."""
        self.filled = False
        if self.owner:
            self.shared.seen = 0
            self.shared.length.zero_()
            self.shared.hub.active, self.shared.hub.prompt = None, False

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens: tiles and sinks."""
        if not self.is_initialized:
            return 0
        held = (self.tiles, *(s for s in self.sinks if s is not None))
        return sum(t.numel() * t.element_size() for t in held)

    def _count(self, count: int) -> None:
        # A kernel could only trap, and take the process's CUDA with it.
        if self.shared.seen + count > self.max_cache_len:
            raise ValueError(
                f"{self.shared.seen} + {count} tokens do not fit a cache of {self.max_cache_len}"
            )
        self.shared.seen += count

    def _fill(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.filled:
            raise RuntimeError(
                "a cache in tiles takes a prompt as one piece, then tokens one by one"
            )
        self.filled = self.shared.hub.prompt = True
        count = key_states.shape[2]
        keys, values = self.codecs
        for begin in range(0, count, _AT_ONCE):
            piece = slice(begin, min(begin + _AT_ONCE, count))
            arriving = key_states[:, :, piece]
            if keys.pre_rope and self.shared.cos is not None and self.shared.sin is not None:
                arriving = unrotate(
                    arriving.float(), self.shared.cos[piece], self.shared.sin[piece]
                )
            coded = keys.encode(arriving), values.encode(value_states[:, :, piece])
            kv_tiles.write(self.tiles, self.form, begin, *coded)
        for sinks, x in zip(self.sinks, (key_states, value_states), strict=True):
            if sinks is not None:
                first = min(count, sinks.shape[2])
                sinks[:, :, :first] = x[:, :, :first]

    def _constants(self, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What kv_attend takes behind the padding, and kv_append."""
        keys, values = self.codecs
        books = kv_constants.books(keys, values, self.form)
        attending: list[Tensor | None] = [books, None, None, None, None]
        coding: list[Tensor | None] = [encoding_books(keys, values), None, None, None, None, None]
        if isinstance(keys, ChannelCodec):
            cos, sin = self.shared.cos, self.shared.sin
            if cos is None or sin is None:  # no rotary embedding: nothing turns
                cos = torch.ones(self.max_cache_len, 2, device=device)
                sin = torch.zeros_like(cos)
            angles = Angles.of(cos, sin, self.form)
            channels = kv_constants.channel_constants(keys, angles, self.form)
            inverse = kv_constants.inverse_scale(keys) if self.form.key_slots else None
            attending[1:] = [channels, inverse, angles.table, angles.steps]
            coding[1:3] = [keys.offset[:, 0].contiguous(), keys.scale[:, 0].contiguous()]
            if keys.feedback:
                coding[3:5] = feedback_constants(keys.feedback)
            coding[5] = coding_angles(angles)
        return tuple(
            tuple(None if t is None else t.to(device).contiguous() for t in part)
            for part in (attending, coding)
        )  # type: ignore[return-value]


def tiled_layers(
    model: nn.Module, formats: Mapping[int, LayerFormat], capacity: int, hub: Hub, counters: Tensor
) -> dict[int, TiledLayer]:
    """Layer → cache of so many tokens, for one sequence without padding.

    EnvironmentFault where no kernel reads such a format, and where the rotary embedding depends on how long
    the text is: keys could not be turned by a table.
    """
    device = next(model.parameters()).device
    tokens = -(-capacity // TOKENS) * TOKENS
    cos = sin = None
    rope = rope_of(model)
    if rope is not None and any(f.keys.pre_rope for f in formats.values()):
        cos, sin = _table(rope, tokens, device)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    shared = Shared(hub, length, counters, cos, sin)
    hub.active, hub.prompt = None, False
    rotary = 0 if cos is None else cos.shape[-1]
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for format in formats.values():
        _form(format, width, rotary if format.keys.pre_rope else 0)
    return {
        index: TiledLayer(
            format, shared, capacity, rotary if format.keys.pre_rope else 0, index == min(formats)
        )
        for index, format in formats.items()
    }


def _form(format: LayerFormat, width: int, rotary: int) -> TileFormat:
    form = TileFormat.of(format.keys, format.values, width, rotary)
    if form is None:
        raise EnvironmentFault(
            f"no kernel attends over a cache of this format with heads {width} wide"
        )
    return form


def _table(rope: Rope, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if rope.moving:
        raise EnvironmentFault(
            "this model's rotary embedding depends on the length of the text; "
            "its cache cannot lie in tiles, use --backend reference"
        )
    ids = torch.arange(tokens, device=device)[None]
    layer_type = "full_attention" if rope.by_layer else None
    cos, sin = rope.at(ids, layer_type, torch.float32)
    return cos[0], sin[0]
