"""The header of a GGUF file, walked before a library believes it.

The reader in the package gguf takes every count and length as it stands: past the end of the file it goes on
with empty arrays, for as long as a count of 64 bits says.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from llmsqueeze import untrusted

# Number of a metadata value's type → its format in struct. 8 is a text, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_NAME, _MOST_DIMENSIONS, _MOST_ALIGNMENT = 2**16, 4, 2**16
# Metadata that models are made of: none is more than the largest extent of a tensor.
_SIZES = (
    "block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv",
    "key_length", "value_length", "dimension_count", "vocab_size", "expert_count",
)  # fmt: skip

_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")

Value = int | float | bool | str | list[int | float | bool]


@dataclass(frozen=True)
class Stored:
    """kind: ggml's number for the type; start, end: of its bytes, from where tensors begin."""

    kind: int
    extents: tuple[int, ...]
    start: int
    end: int


@dataclass
class _Walk:
    data: mmap.mmap
    order: str = "<"
    at: int = 0
    found: dict[str, Value] = field(default_factory=dict)

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin; ValueError if they are not there."""
        if size > len(self.data) - self.at:
            raise ValueError("is cut short, or has a length that is not its own")
        self.at += size
        return self.at - size

    def number(self, format: str) -> int:
        value: int = struct.unpack_from(
            self.order + format, self.data, self.take(struct.calcsize(self.order + format))
        )[0]
        return value

    def text(self, most: int | None = None) -> str:
        size = self.number("Q")
        if most is not None and size > most:
            raise ValueError(f"has a name of {size:,} bytes")
        start = self.take(size)
        return self.data[start : self.at].decode("utf-8")

    def value(self) -> Value:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_format(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            for _ in range(count):  # each takes some bytes: it ends with the file
                self.take(self.number("Q"))
            return []
        size = struct.calcsize(self.order + _format(kind))
        start = self.take(count * size)
        return list(
            struct.unpack_from(f"{self.order}{min(count, 4096)}{_format(kind)}", self.data, start)
        )


def _format(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"has a value of type {kind}, which is none")
    return _SCALARS[kind]


def read(path: Path) -> tuple[dict[str, Value], dict[str, Stored]]:
    """Metadata and tensors by name; ValueError on a header that lies, or tensors that overlap or are missing.

    Of a text, its characters; of an array, its first numbers; of an array of texts, nothing.
    """
    if untrusted.check_file(path) < 24:
        raise ValueError("is cut short")
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _read(_Walk(data))
        except UnicodeDecodeError as error:
            raise ValueError("has a name or text that is not UTF-8") from error


def _read(walk: _Walk) -> tuple[dict[str, Value], dict[str, Stored]]:
    if walk.data[walk.take(4) : 4] != b"GGUF":
        raise ValueError("does not begin like a GGUF file")
    version = walk.number("I")
    if version & 0xFFFF == 0:  # of a machine with the other byte order
        walk.order, walk.at = ">", 4
        version = walk.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"has version {version}")
    count, pairs = walk.number("Q"), walk.number("Q")
    for _ in range(pairs):  # each takes some bytes
        name = walk.text(_MOST_NAME)
        if name in walk.found:
            raise ValueError(f"has {name!r} twice")
        walk.found[name] = walk.value()
    stored: dict[str, Stored] = {}
    for _ in range(count):
        name = walk.text(_MOST_NAME)
        if name in stored:
            raise ValueError(f"has tensor {name!r} twice")
        stored[name] = _stored(walk, name)
    _check_places(walk, stored)
    _check_sizes(walk.found, stored)
    return walk.found, stored


def _stored(walk: _Walk, name: str) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rank = walk.number("I")
    if rank > _MOST_DIMENSIONS:
        raise ValueError(f"has tensor {name!r} of {rank} dimensions")
    extents = tuple(walk.number("Q") for _ in range(rank))
    kind, start = walk.number("I"), walk.number("Q")
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"has tensor {name!r} of type {kind}, which is none") from error
    elements = math.prod(extents)
    if elements == 0 or not extents or extents[0] % block:
        raise ValueError(f"has tensor {name!r} of shape {extents}")
    return Stored(kind, extents, start, start + elements // block * size)


def _check_places(walk: _Walk, stored: dict[str, Stored]) -> None:
    alignment = walk.found.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= _MOST_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise ValueError(f"has an alignment of {alignment!r}")
    begin = -(-walk.at // alignment) * alignment
    last = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].start):
        if tensor.start < last or tensor.start % alignment:
            raise ValueError(f"has tensor {name!r} where another is, or at no whole place")
        last = tensor.end
        if last > len(walk.data) - begin:
            raise ValueError(f"is cut short: tensor {name!r} ends behind it")


def check_model(found: dict[str, Value], stored: dict[str, Stored]) -> None:
    """ValueError where the library would take a size of its own, or leave out some of the blocks."""
    model = found.get("general.architecture")
    for name in _NEEDED:
        if f"{model}.{name}" not in found:
            raise ValueError(f"says nothing of {model}.{name}")
    blocks = {name.split(".")[1] for name in stored if name.startswith("blk.")}
    count = found[f"{model}.block_count"]
    if count != len(blocks):
        raise ValueError(f"says {model}.block_count is {count!r}, and has {len(blocks)}")


def _check_sizes(found: dict[str, Value], stored: dict[str, Stored]) -> None:
    most = max((extent for tensor in stored.values() for extent in tensor.extents), default=0)
    for name, value in found.items():
        wanted = len(stored) if name.endswith(".block_count") else most
        if name.rpartition(".")[2] in _SIZES:
            for size in value if isinstance(value, list) else [value]:
                if type(size) is not int or not 0 <= size <= wanted:
                    raise ValueError(f"says {name} is {size!r}, which its tensors do not bear out")
