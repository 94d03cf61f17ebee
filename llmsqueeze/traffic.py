"""Bytes that decoding one token reads: the unit in which methods of different kinds compare."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import nn

from llmsqueeze.activation import ActivationRecord, GateRecord
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.shards import DTYPES, StoredTensor


def stored_bytes(checkpoint: Checkpoint, parameter: str) -> int:
    """Bytes of one parameter as it lies on disk, a compressed site with its mask."""
    source = checkpoint.sources[parameter]
    parts = [source] if isinstance(source, StoredTensor) else list(source.parts.values())
    return sum(prod(part.shape) * DTYPES[part.dtype].itemsize for part in parts)


def bytes_per_token(
    checkpoint: Checkpoint,
    record: ActivationRecord | None = None,
    dropped: Mapping[str, float] | None = None,
) -> int:
    """Bytes of everything but the KV cache that one decoded token reads.

    Blocks, final norm and output head whole (of embeddings that are not the head one row), each linear
    less what its gates drop, plus thresholds and low-rank factors. Of experts as many as are chosen for a
    token, dense, since nothing runs them as they are stored. record: the gates, by default the
    checkpoint's own. dropped: measured shares by gate; by default what each gate is meant to drop.
    """
    record = record or checkpoint.activation
    return read_bytes(checkpoint, record.gates if record else {}, dropped)


def read_bytes(
    checkpoint: Checkpoint,
    gates: Mapping[str, GateRecord],
    dropped: Mapping[str, float] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
) -> int:
    """The same of any gates. sizes: of parameters that will have others than they have; see forecast."""
    kept: dict[str, float] = {}
    extra = 0
    for name, gate in gates.items():
        share = 1 - (gate.sparsity if dropped is None else dropped.get(name, gate.sparsity))
        for linear in (*gate.members, *gate.rows):
            kept[linear] = kept.get(linear, 1.0) * share
        extra += 4 * gate.width
        if gate.rank:
            outputs = sum(checkpoint.model.get_submodule(m).out_features for m in gate.members)
            extra += gate.rank * (gate.width + outputs) * checkpoint.dtype.itemsize
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    head = {id(p) for p in checkpoint.model.get_output_embeddings().parameters()}
    looked_up = {
        id(module.weight)
        for module in checkpoint.model.modules()
        if isinstance(module, nn.Embedding)
    }
    if not any(id(parameters[name]) in head for name in checkpoint.sources):
        # A head that is tied to the embedding is not stored, and reads all of it.
        looked_up.discard(id(checkpoint.model.get_input_embeddings().weight))
    total = float(extra)
    for name in checkpoint.sources:
        size = (sizes or {}).get(name) or stored_bytes(checkpoint, name)
        if name in checkpoint.routed_shares:
            whole = parameters[name].numel() * checkpoint.site_dtype(name).itemsize
            size = round(whole * checkpoint.routed_shares[name])
        if id(parameters[name]) in looked_up:
            size //= parameters[name].shape[0]
        total += size * kept.get(name.removesuffix(".weight"), 1.0)
    return round(total)
