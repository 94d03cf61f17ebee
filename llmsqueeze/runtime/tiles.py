"""A cache of fixed size whose keys and values lie as a kernel reads them: coded, in tiles.

Decoding codes every new token into its tile and attends over the tiles; nothing is ever unpacked. A prompt
attends to its own keys and values as they are, and is coded afterwards. Before a later piece of it, or the
next turn of a chat, what is cached is unpacked once, for transformers' own attention.

Layers of sliding attention keep a ring of tiles, as many as their window can touch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import kv_constants, kv_tiles
from llmsqueeze.numerics.kv_codecs import ChannelCodec
from llmsqueeze.numerics.kv_constants import Angles
from llmsqueeze.numerics.kv_tiles import TOKENS, TileFormat
from llmsqueeze.numerics.rope import rotate, unrotate
from llmsqueeze.ops.packed_append import coding_angles, encoding_books, feedback_constants
from llmsqueeze.ops.packed_attention import ring_tiles
from llmsqueeze.runtime.kv_cache import LayerFormat
from llmsqueeze.runtime.positions import Rope, rope_of
from llmsqueeze.runtime.prompts import check_positions, padding_of
from llmsqueeze.runtime.spans import Span, spans

# Tokens of a prompt that are coded at a time by torch: fp64 intermediates of more would be large.
_AT_ONCE = 2048


@dataclass
class Piece:
    """More than one token that a layer was just given: what it codes once the mask is known."""

    layer: TiledLayer
    keys: Tensor
    values: Tensor


class Hub:
    """What a cache tells the attention that is called next. One to a model. active: the layer that cached
    one token in tiles; piece: more than one."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.active: TiledLayer | None = None
        self.piece: Piece | None = None


@dataclass
class Shared:
    """What the layers of a cache have in common. length: [1] int32, cached tokens; seen: the same as a
    number, but for steps that were compiled or that a CUDA graph replays; before: cached tokens when the
    piece that goes on began; padding: [batch] int32, slots in front of each row's first token, None for
    none; tables: kind of attention → cos, sin [tokens, R] fp32 of every position, where keys are coded
    before the rotary embedding; skip: nats, see kv_attend; checked: windows whose mask was looked at."""

    hub: Hub
    length: Tensor
    counters: Tensor
    rope: Rope | None
    tables: dict[str, tuple[Tensor, Tensor]]
    seen: int = 0
    before: int = 0
    padding: Tensor | None = None
    checked: set[int] = field(default_factory=set)
    angles: dict[str, tuple[Angles, Tensor]] = field(default_factory=dict)


class TiledLayer(CacheLayerMixin):  # type: ignore[misc]  # untyped in transformers
    """One layer. capacity: tokens; rotary: channels of a key that are turned; skip: nats, see kv_attend;
    owner: this layer counts tokens, the first that is called; mixed: others of the cache are
    transformers' own, of fixed size, and masks are made for those."""

    # What transformers' generate would compile by itself; Decoder does where it is asked to.
    is_compileable = False

    def __init__(
        self, format: LayerFormat, shared: Shared, capacity: int, span: Span, rotary: int, skip: float,
        owner: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.format, self.shared, self.owner = format, shared, owner
        self.max_cache_len = -(-capacity // TOKENS) * TOKENS
        self.window, self.kind = span.window, span.kind
        self.rotary, self.skip = rotary, skip
        self.mixed = False

    @property
    def is_sliding(self) -> bool:
        return bool(self.window) and not self.mixed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        device = key_states.device
        keys, values = (codec.to(device) for codec in (self.format.keys, self.format.values))
        if value_states.shape[-1] != width:
            raise EnvironmentFault("no kernel attends over keys and values of different widths")
        self.form, self.codecs = _form(self.format, width, self.rotary), (keys, values)
        held = self.max_cache_len
        if self.window:
            held = min(held, TOKENS * ring_tiles(self.window))
        self.tiles = self.form.empty(batch, heads, held, device)
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
        """Cache [batch, kv heads, tokens, D]. Returns what a piece of a prompt attends to, in order; of a
        single token that itself, since attend() reads the tiles."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shared, count = self.shared, key_states.shape[2]
        if shared.hub.active is not None or shared.hub.piece is not None:
            raise RuntimeError(
                "this model's attention did not look at what it cached; choose another with "
                "model.set_attn_implementation('sdpa') before its decoder is made"
            )
        if self.owner:
            if count > 1:
                shared.before = shared.seen = int(shared.length)
                shared.checked.clear()
            if not torch.compiler.is_compiling():  # it would compile anew for another number
                self._count(count)
            shared.length.add_(count)
        if count > 1:
            shared.hub.piece = Piece(self, key_states, value_states)
            if not shared.before:
                return key_states, value_states
            both = zip(self._unpacked(), (key_states, value_states), strict=True)
            keys, values = (torch.cat(parts, dim=2) for parts in both)
            return keys, values
        self._append(key_states, value_states)
        shared.hub.active = self
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """[batch, 1, heads, D] of the newest token's queries [batch, heads, 1, D]."""
        y: Tensor = torch.ops.llmsqueeze.kv_attend(
            query, self.tiles, self.shared.length, self.shared.padding, *self._attending, *self.sinks,
            self.shared.counters, self.form.arguments(), self.window, scale, self.skip,
        )  # fmt: skip
        return y

    def take(self, piece: Piece, mask: Tensor | None) -> Tensor | None:
        """Code a piece of a prompt. mask: what its attention was given; returns it for keys of update().

        EnvironmentFault on a mask that hides more than what is to come, what slid out and what stands in
        front of the first token of a row.
        """
        shared = self.shared
        first, end = self._oldest(), shared.before + piece.keys.shape[2]
        if mask is not None:
            mask = mask[..., first:end] if self.mixed else mask
        if self.window not in shared.checked:
            given = shared.padding if shared.before else None
            found = padding_of(mask, shared.before, end, first, self.window, given)
            if not shared.before:
                shared.padding = found
            shared.checked.add(self.window)
            if found is not None and self.format.keys.pre_rope and shared.rope is not None:
                check_positions(shared.rope, self.kind, end, found)
        self._code(piece.keys, piece.values)
        return mask

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.mixed:
            return self.max_cache_len, 0
        if query_length == 1:  # decoding needs no mask
            return 1, 0
        held = seen = int(self.shared.length)
        if self.window:
            held = min(held, self.window - 1)
        return held + query_length, seen - held

    def get_seq_length(self) -> Any:
        return self.shared.length[0]

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # before transformers 5.24

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from another one; what is allocated stays where it is."""
        held = (
            [*(t for t in (self.tiles, *self.sinks) if t is not None)]
            if self.is_initialized
            else []
        )
        if self.owner and self.shared.padding is not None:
            held.append(self.shared.padding)
        for tensor in held:
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def reset(self) -> None:
        """Forget every token; what is allocated stays where it is."""
        if self.owner:
            self.shared.seen = self.shared.before = 0
            self.shared.padding = None
            self.shared.length.zero_()
            self.shared.hub.clear()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens: tiles and sinks."""
        if not self.is_initialized:
            return 0
        held = (self.tiles, *(s for s in self.sinks if s is not None))
        return sum(t.numel() * t.element_size() for t in held)

    def read_bytes(self, tokens: int) -> int:
        """Of them, what attention behind so many tokens reads."""
        seen = min(tokens, self.window) if self.window else tokens
        return self.nbytes * seen // (self.tiles.shape[2] * TOKENS) if self.is_initialized else 0

    def _count(self, count: int) -> None:
        # A kernel could only trap, and take the process's CUDA with it.
        if self.shared.seen + count > self.max_cache_len:
            raise ValueError(
                f"{self.shared.seen} + {count} tokens do not fit a cache of {self.max_cache_len}"
            )
        self.shared.seen += count

    def _oldest(self) -> int:
        """The first slot that the first token of the piece that goes on sees."""
        return max(self.shared.before - self.window + 1, 0) if self.window else 0

    def _positions(self, begin: int, end: int) -> Tensor:
        """[batch or 1, slots] of these slots; 0 for padding."""
        slots = torch.arange(begin, end, device=self.device)[None]
        padding = self.shared.padding
        return slots if padding is None else (slots - padding[:, None]).clamp_min(0)

    def _angles(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin [batch or 1, 1, slots, R] that turn the keys of these slots; None if they are coded
        as they are."""
        if not self.rotary:
            return None
        at = self._positions(begin, end)
        cos, sin = (table[at][:, None] for table in self.shared.tables[self.kind])
        return cos, sin

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv heads, slots, D] of all slots before a piece that it may see."""
        begin, end = self._oldest(), self.shared.before
        first = begin // TOKENS
        numbers = torch.arange(first, -(-end // TOKENS), device=self.device)
        some = self.tiles.index_select(2, numbers % self.tiles.shape[2])
        parts = kv_tiles.read(some, self.form, end - TOKENS * first)
        keys, values = (
            codec.decode(part, self.form.width, torch.float32)[:, :, begin - TOKENS * first :]
            for codec, part in zip(self.codecs, parts, strict=True)
        )
        if angles := self._angles(begin, end):
            keys = rotate(keys, *angles)
        found = keys.to(self.dtype), values.to(self.dtype)
        for x, kept in zip(found, self.sinks, strict=True):
            if kept is not None:
                for place, rows, slots in self._sink_slots(begin, end):
                    x[rows, :, slots - begin] = kept[rows, :, place]
        return found

    def _sink_slots(self, begin: int, end: int) -> list[tuple[int, Tensor, Tensor]]:
        """Of every position that is kept exactly: it, the rows that have it between these slots, where."""
        padding = self.shared.padding
        start = self.shared.length.new_zeros(len(self.tiles)) if padding is None else padding
        found = []
        for place in range(self.format.sinks):
            slots = start.long() + place
            rows = ((slots >= begin) & (slots < end)).nonzero()[:, 0]
            found.append((place, rows, slots[rows]))
        return found

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Code these, the newest tokens."""
        torch.ops.llmsqueeze.kv_append(
            keys, values, self.tiles, self.shared.length, self.shared.padding, *self._coding,
            *self.sinks, self.form.arguments(), self.window,
        )  # fmt: skip

    def _code(self, keys: Tensor, values: Tensor) -> None:
        """The tokens of a piece, or those of them that a window still sees."""
        before, end = self.shared.before, self.shared.before + keys.shape[2]
        for x, kept in zip((keys, values), self.sinks, strict=True):
            if kept is not None:
                for place, rows, slots in self._sink_slots(before, end):
                    kept[rows, :, place] = x[rows, :, slots - before]
        if (
            self.shared.padding is not None
        ):  # whatever attention made of it, tiles must hold numbers
            slots = torch.arange(before, end, device=self.device)
            hidden = (slots < self.shared.padding[:, None])[:, None, :, None]
            keys, values = (x.masked_fill(hidden, 0) for x in (keys, values))
        held = self.tiles.shape[2] * TOKENS
        begin = max(before, -(-end // TOKENS) * TOKENS - held)
        if keys.is_cuda:
            self._append(keys[:, :, begin - before :], values[:, :, begin - before :])
            return
        # The kernel for a CPU has one thread.
        while begin < end:
            # Up to where the ring begins again.
            stop = min(end, begin + _AT_ONCE, begin // held * held + held)
            arriving, coming = (x[:, :, begin - before : stop - before] for x in (keys, values))
            if angles := self._angles(begin, stop):
                arriving = unrotate(arriving.float(), *angles)
            coded = self.codecs[0].encode(arriving), self.codecs[1].encode(coming)
            kv_tiles.write(self.tiles, self.form, begin % held, *coded)
            begin = stop

    def _constants(self, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What kv_attend takes behind the padding, and kv_append."""
        keys, values = self.codecs
        books = kv_constants.books(keys, values, self.form)
        attending: list[Tensor | None] = [books, None, None, None, None]
        coding: list[Tensor | None] = [encoding_books(keys, values), None, None, None, None, None]
        if isinstance(keys, ChannelCodec):
            angles, coding_table = self._shared_angles(device)
            channels = kv_constants.channel_constants(keys, angles, self.form)
            inverse = kv_constants.inverse_scale(keys) if self.form.key_slots else None
            attending[1:] = [channels, inverse, angles.table, angles.steps]
            coding[1:3] = [keys.offset[:, 0].contiguous(), keys.scale[:, 0].contiguous()]
            if keys.feedback:
                coding[3:5] = feedback_constants(keys.feedback)
            coding[5] = coding_table
        return tuple(
            tuple(None if t is None else t.to(device).contiguous() for t in part)
            for part in (attending, coding)
        )  # type: ignore[return-value]

    def _shared_angles(self, device: torch.device) -> tuple[Angles, Tensor]:
        """What the layers of a kind turn by, and the table that new keys are turned back by."""
        known = self.shared.angles
        if self.kind not in known:
            if self.rotary:
                cos, sin = self.shared.tables[self.kind]
            else:  # no rotary embedding: nothing turns
                cos = torch.ones(self.max_cache_len, 2, device=device)
                sin = torch.zeros_like(cos)
            angles = Angles.of(cos, sin, self.form)
            known[self.kind] = angles, coding_angles(angles)
        return known[self.kind]


def tiled_layers(
    model: nn.Module, formats: Mapping[int, LayerFormat], capacity: int, hub: Hub, counters: Tensor,
    skip_mass: float = 0.0,
) -> dict[int, TiledLayer]:  # fmt: skip
    """Layer → cache of so many tokens.

    skip_mass: the share of the softmax's weight that attention may leave out, in tiles whose tokens have
    next to none; 0: nothing is. EnvironmentFault where no kernel reads such a format, and where the rotary
    embedding depends on how long the text is: keys could not be turned by a table.
    """
    device = next(model.parameters()).device
    tokens = -(-capacity // TOKENS) * TOKENS
    config: Any = model.config
    known = spans(config)
    tables = {}
    rope = rope_of(model)
    if rope is not None:
        kinds = {known[layer].kind for layer, f in formats.items() if f.keys.pre_rope}
        tables = {kind: _table(rope, tokens, device, kind) for kind in kinds}
    length = torch.zeros(1, dtype=torch.int32, device=device)
    shared = Shared(hub, length, counters, rope, tables)
    hub.clear()
    config = config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {}
    for index, format in formats.items():
        span = known[index]
        rotary = 0
        if format.keys.pre_rope and rope is not None:
            rotary = tables[span.kind][0].shape[-1]
        _form(format, width, rotary)
        skip = skip_below(min(tokens, span.window or tokens), skip_mass)
        owner = index == min(formats)
        found[index] = TiledLayer(format, shared, capacity, span, rotary, skip, owner)
    return found


def skip_below(tokens: int, mass: float) -> float:
    """Nats below the largest score from which tokens, so many of them, together have less than this share
    of a softmax's weight; 0 for a share of 0."""
    return math.log(tokens / mass) if mass else 0.0


def _form(format: LayerFormat, width: int, rotary: int) -> TileFormat:
    form = TileFormat.of(format.keys, format.values, width, rotary)
    if form is None:
        raise EnvironmentFault(
            f"no kernel attends over a cache of this format with heads {width} wide"
        )
    return form


def _table(rope: Rope, tokens: int, device: torch.device, kind: str) -> tuple[Tensor, Tensor]:
    if rope.moving:
        raise EnvironmentFault(
            "this model's rotary embedding depends on the length of the text; "
            "its cache cannot lie in tiles, use --backend reference"
        )
    ids = torch.arange(tokens, device=device)[None]
    cos, sin = rope.at(ids, kind if rope.by_layer else None, torch.float32)
    return cos[0], sin[0]
