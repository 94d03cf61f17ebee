"""How a compressed linear lies on disk: each encoding gives back the same weight, bit for bit.

A table: an encoding is the parts that are stored as SITE.weight_PART, and two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.numerics import int8
from llmsqueeze.numerics.packing import INT_OF_SIZE, check_bitmask, pack_bitmask, unpack_bitmask

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Encoding:
    """parts: their names. fits: whether a weight can be stored so. encode: its parts. layout: tensors
    without data, shaped as these. decode: the weight from parts and its columns. check: ValueError if these
    do not belong together, which decode raises too. typed: the part that has the weight's dtype; long: one
    that has as many rows."""

    parts: tuple[str, ...]
    typed: str
    fits: Callable[[Tensor], bool]
    encode: Callable[[Tensor], Parts]
    layout: Callable[[Tensor], Parts]
    decode: Callable[[Parts, int], Tensor]
    check: Callable[[Parts, int], None]
    long: str


def _encode_bitmask(weight: Tensor) -> Parts:
    return dict(zip(("values", "mask", "row_offsets"), pack_bitmask(weight), strict=True))


def _layout_bitmask(weight: Tensor) -> Parts:
    rows, columns = weight.shape
    return {
        "values": torch.empty(nonzeros(weight), dtype=weight.dtype, device="meta"),
        "mask": torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta"),
        "row_offsets": torch.empty(rows + 1, dtype=torch.int32, device="meta"),
    }


def _decode_bitmask(parts: Parts, columns: int) -> Tensor:
    return unpack_bitmask(parts["values"], parts["mask"], parts["row_offsets"], columns)


def _encode_int8(weight: Tensor) -> Parts:
    codes, largest = int8.encode(weight.detach().cpu())
    return {"codes": codes, "largest": largest}


def _layout_int8(weight: Tensor) -> Parts:
    return {
        "codes": torch.empty(weight.shape, dtype=torch.int8, device="meta"),
        "largest": torch.empty(weight.shape[0], dtype=weight.dtype, device="meta"),
    }


def _check_bitmask(parts: Parts, columns: int) -> None:
    check_bitmask(parts["values"], parts["mask"], parts["row_offsets"], columns)


def _check_int8(parts: Parts, columns: int) -> None:
    codes, largest = parts["codes"], parts["largest"]
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != columns:
        raise ValueError(f"codes {codes.dtype} {tuple(codes.shape)} do not fit {columns} columns")
    if largest.shape != codes.shape[:1] or not largest.is_floating_point():
        raise ValueError(f"{largest.numel()} magnitudes {largest.dtype} for {codes.shape[0]} rows")
    if not bool((largest >= 0).all()):
        raise ValueError("magnitudes that are none")


def _decode_int8(parts: Parts, columns: int) -> Tensor:
    _check_int8(parts, columns)
    codes, largest = parts["codes"], parts["largest"]
    return int8.decode(codes, int8.scales(largest), largest.dtype)


# values       [nonzeros]                the weight's dtype, see numerics.packing
# mask         [rows, ceil(columns/8)]   uint8
# row_offsets  [rows + 1]                int32
_BITMASK = Encoding(
    ("values", "mask", "row_offsets"),
    "values",
    lambda weight: True,
    _encode_bitmask,
    _layout_bitmask,
    _decode_bitmask,
    _check_bitmask,
    "mask",
)
# codes        [rows, columns]           int8, see numerics.int8
# largest      [rows]                    the weight's dtype, every row's largest magnitude
_INT8 = Encoding(
    ("codes", "largest"),
    "largest",
    int8.fits,
    _encode_int8,
    _layout_int8,
    _decode_int8,
    _check_int8,
    "codes",
)

ENCODINGS = {"bitmask": _BITMASK, "int8": _INT8}


def smallest(weight: Tensor) -> tuple[str, Parts]:
    """The encoding of a [rows, columns] weight that takes fewest bytes, and its parts; "dense": none."""
    name, _ = smallest_layout(weight)
    return name, ENCODINGS[name].encode(weight) if name in ENCODINGS else {}


def smallest_layout(weight: Tensor) -> tuple[str, Parts]:
    """The same, the parts without data: what they take is known before they are made."""
    best, parts, least = "dense", {}, _bytes(weight)
    for name, encoding in ENCODINGS.items():
        if encoding.fits(weight):
            found = encoding.layout(weight)
            size = sum(map(_bytes, found.values()))
            if size < least:
                best, parts, least = name, found, size
    return best, parts


def nonzeros(weight: Tensor) -> int:
    """By their bits, as the bitmask counts: -0.0 is stored."""
    return int(torch.count_nonzero(weight.view(INT_OF_SIZE[weight.element_size()])))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def owner_of(name: str) -> str:
    """The parameter that a stored tensor belongs to: itself, or the weight it is a part of."""
    for encoding in ENCODINGS.values():
        for part in encoding.parts:
            if name.endswith(f".weight_{part}"):
                return name.removesuffix(f"_{part}")
    return name
