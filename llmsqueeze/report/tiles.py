"""Maps of tiles: for every pruned linear a small image, a pixel a tile."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

# Pixels of a tile, and of the longer side of the largest map at most.
LARGEST_TILE, LONGEST = 6.0, 150.0
DENSE, SPARSE = "#14245f", "#f2c14e"


def dense_shares(tiles: Mapping[str, Any]) -> dict[str, float]:
    """The share of dense tiles of every site."""
    return {
        name: sum(row.count("1") for row in rows) / sum(map(len, rows))
        for name, rows in tiles["sites"].items()
    }


def tile_pixels(tiles: Mapping[str, Any]) -> float:
    """How large to show a tile so that maps of all sites fit beside each other, all at one scale."""
    longest = max(max(len(rows), len(rows[0])) for rows in tiles["sites"].values())
    return min(LARGEST_TILE, LONGEST / longest)


def image(rows: Sequence[str], pixels: float, label: str) -> str:
    """One map as an HTML image; its colours are DENSE and SPARSE."""
    data = base64.b64encode(_png(rows)).decode("ascii")
    width, height = len(rows[0]) * pixels, len(rows) * pixels
    return (
        f'<img class="tiles" width="{width:.0f}" height="{height:.0f}" alt="{label}" title="{label}" '
        f'src="data:image/png;base64,{data}">'
    )


def _png(rows: Sequence[str]) -> bytes:
    """A PNG of one bit a pixel: 0 is SPARSE, 1 is DENSE."""
    width, height = len(rows[0]), len(rows)
    padded = (row.ljust(-(-width // 8) * 8, "0") for row in rows)
    lines = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in padded)
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in (SPARSE, DENSE))
    header = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
