"""What a checkpoint takes of a GPU's memory while it decodes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmsqueeze.checkpoint import Checkpoint, PackedSource, Source
from llmsqueeze.numerics.kv_tiles import TOKENS, TileFormat
from llmsqueeze.ops.packed_attention import ring_tiles
from llmsqueeze.runtime.kv_cache import LayerFormat, stored_formats
from llmsqueeze.runtime.packed import LEAST_SPARSITY
from llmsqueeze.runtime.spans import spans
from llmsqueeze.traffic import bytes_per_token, stored_bytes

# Bits of a non-zero in the layout of gaps, its share of gaps and starts included: with gaps of 3 and of 4
# bits, on matrices of 4096 to 28672 rows with 50 and 70 % zeros.
GAP_BITS = (19.9, 21.4)
WIDE_GAPS = 0.65
# Kept free for CUDA itself, its libraries' workspaces and the activations of a prompt.
RESERVE = 2 * 10**9


@dataclass(frozen=True)
class Capacity:
    """Bytes. weights: on the device, dense: the same weights in 16 bits; read: of weights by one token,
    before its cache; cache: of one sequence's token, plain: with a cache of 16 bits; sinks: once for every
    sequence; window: of layers of sliding attention, once for every sequence, plain_window: in 16 bits;
    kernel: whether attention reads the cache as it lies. positions: that the model was built for, None if it
    does not say."""

    weights: int
    dense: int
    read: int
    cache: float
    plain: float
    sinks: int
    window: int
    plain_window: int
    kernel: bool
    positions: int | None

    def longest(self, memory: int, batch: int, *, plain: bool = False) -> int:
        """Tokens that each of `batch` sequences can have in so much memory; 0: weights alone do not fit."""
        weights = self.dense if plain else self.weights
        left = (memory - RESERVE - weights) / batch
        left -= self.plain_window if plain else self.window + self.sinks
        per_token = self.plain if plain else self.cache
        tokens = int(left // per_token) if left > 0 and per_token else 0
        return tokens // TOKENS * TOKENS


def capacity(checkpoint: Checkpoint) -> Capacity:
    """Of a checkpoint in 16 bits with kernels; weights with zeros are estimated, all else is exact."""
    config = checkpoint.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 4 * heads * width
    formats: dict[int, LayerFormat] = {}
    if checkpoint.kv_cache:
        formats = stored_formats(checkpoint.kv_cache, checkpoint.read_kv_cache())
    known = spans(config)
    cache, sinks, window, plain_window, full, kernel = 0.0, 0, 0, 0, 0, bool(formats)
    for index in range(config.num_hidden_layers):
        span = known[index].window if index in known else 0
        token: float = plain
        if index in formats:
            format = formats[index]
            form = TileFormat.of(format.keys, format.values, width, _rotary(config, width, format))
            kernel &= form is not None
            bits = 2 * format.bits_per_element(heads, width)
            token = heads * (form.record / TOKENS if form else width * bits / 8)
            sinks += format.sinks * plain
        if span:
            held = TOKENS * ring_tiles(span) if index in formats else span
            window += round(held * token)
            plain_window += span * plain
        else:
            cache += token
            full += 1
    gates = checkpoint.activation.gates.values() if checkpoint.activation else ()
    gated = {f"{member}.weight" for gate in gates for member in (*gate.members, *gate.rows)}
    weights = sum(_on_device(checkpoint, name, name in gated) for name in checkpoint.sources)
    positions = getattr(config, "max_position_embeddings", None)
    return Capacity(
        weights=weights,
        dense=sum(2 * _elements(source) for source in checkpoint.sources.values()),
        read=bytes_per_token(checkpoint),
        cache=cache,
        plain=plain * full,
        sinks=sinks,
        window=window,
        plain_window=plain_window,
        kernel=kernel,
        positions=positions if isinstance(positions, int) else None,
    )


def _on_device(checkpoint: Checkpoint, name: str, gated: bool) -> int:
    """Bytes in the layout that runtime.linears chooses."""
    source = checkpoint.sources[name]
    elements = _elements(source)
    if not isinstance(source, PackedSource) or name in checkpoint.routed_shares:
        return 2 * elements
    record = source.record
    if record.encoding != "bitmask":
        return stored_bytes(checkpoint, name)
    pattern = _pattern(checkpoint)
    if pattern == ("2:4-out" if gated else "2:4"):
        return elements * 9 // 8
    if pattern == "tile" and not gated:  # half of what is not in dense tiles is zero
        return round(elements * (16 - 14 * record.sparsity) / 8)
    if gated or record.sparsity < LEAST_SPARSITY:
        return 2 * elements
    return round(record.nonzeros * GAP_BITS[record.sparsity >= WIDE_GAPS] / 8)


def _elements(source: Source) -> int:
    return prod(source.record.shape if isinstance(source, PackedSource) else source.shape)


def _pattern(checkpoint: Checkpoint) -> str:
    """What the last step that pruned left."""
    pruned = [step for step in checkpoint.steps if step["command"] == "prune"]
    return str(pruned[-1]["recipe"]["target"]["pattern"]) if pruned else ""


def _rotary(config: object, width: int, format: LayerFormat) -> int:
    """How many channels of a key the rotary embedding turns, where that matters."""
    if not format.keys.pre_rope:
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1)
    return int(width * (share or 1))
