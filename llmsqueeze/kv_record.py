"""KV-cache quantisation as it lies in a checkpoint: a record in the manifest, tensors in a file beside.

llmsqueeze-kv.safetensors holds, for a calibrated method and every packed layer N (H key-value heads of
width D),
N.key_offset, N.key_scale           [H, D] fp16, of every channel before the rotary embedding
N.key_encode, N.key_decode          [2^bits] fp32: the codebook, and what its codes stand for
N.value_encode, N.value_decode      the same of values
N.key_diagonal [H, D], N.key_factors [H, D, rank] fp16: the metric that rounding errors are passed on by,
                                    if there is one
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.methods import CALIBRATED_KV, KV_BITS
from llmsqueeze.shards import KV_NAME, ShardRecord, StoredTensor
from llmsqueeze.side_files import open_side_file, read_side_file


@dataclass(frozen=True)
class KvRecord:
    """method, bits: of methods.KV_BITS; layers: indices of the packed layers; heads, width: of their keys.

    The rest is of a calibrated method, else 0 and None. key_slots, value_slots: outliers of every token
    and head; sinks: first positions kept in 16 bits; turned: values are rotated first; rank: of the
    metric, 0 for none; file: of the tensors.
    """

    method: str
    bits: int
    layers: tuple[int, ...]
    heads: int
    width: int
    key_slots: int = 0
    value_slots: int = 0
    sinks: int = 0
    turned: bool = False
    rank: int = 0
    file: ShardRecord | None = None

    def __str__(self) -> str:
        """As --kv-cache writes a format, with what is kept exactly."""
        if self.method == "fp8":
            return "fp8"
        slots = self.key_slots + self.value_slots
        kept = f", {slots} outlier slot{'s' * (slots > 1)}" if slots else ""
        return f"{self.method}:{self.bits}{kept}"

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> KvRecord:
        """Strict inverse of asdict; ValueError, TypeError or KeyError on anything else."""
        if set(raw) != {f.name for f in fields(cls)}:
            raise ValueError("kv_cache")
        file = raw["file"]
        record = cls(
            **{
                **raw,
                "layers": tuple(raw["layers"]),
                "file": None if file is None else ShardRecord(**file),
            }
        )
        counts = (record.key_slots, record.value_slots, record.sinks, record.rank)
        fine = (
            record.method in KV_BITS
            and record.bits in KV_BITS[record.method]
            and all(type(n) is int and n >= 0 for n in (*counts, *record.layers))
            and type(record.heads) is int
            and type(record.width) is int
            and min(record.heads, record.width) > 0
            and max(record.key_slots, record.value_slots) < record.width
            and type(record.turned) is bool
            and bool(record.layers)
            and len(set(record.layers)) == len(record.layers)
            and (record.file is not None) == (record.method == CALIBRATED_KV)
            and (record.method == CALIBRATED_KV or not any((*counts, record.turned)))
        )
        if not fine:
            raise ValueError("kv_cache")
        return record


def kv_tensors(directory: Path, record: KvRecord) -> dict[str, StoredTensor]:
    """Headers of the tensors, checked against the record. CheckpointError on any mismatch."""
    if record.file is None:
        return {}
    per_channel, values = (record.heads, record.width), (2**record.bits,)
    shapes: dict[str, tuple[int, ...]] = {
        "key_offset": per_channel,
        "key_scale": per_channel,
        "key_encode": values,
        "key_decode": values,
        "value_encode": values,
        "value_decode": values,
    }
    if record.rank:
        shapes |= {"key_diagonal": per_channel, "key_factors": (*per_channel, record.rank)}
    expected = {f"{n}.{part}": shape for n in record.layers for part, shape in shapes.items()}
    return open_side_file(directory, KV_NAME, record.file, expected)


def read_kv_tensors(stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors; CheckpointError on values that cannot be."""
    tensors = read_side_file(stored)
    for name, tensor in tensors.items():
        part = name.partition(".")[2]
        scale = part in ("key_scale", "key_diagonal")
        book = part.endswith(("_encode", "_decode"))
        if (scale and not bool((tensor > 0).all())) or (
            book and not bool((tensor.diff() >= 0).all())
        ):
            raise CheckpointError(f"{name} holds values that cannot be; the calibration is damaged")
    return tensors
