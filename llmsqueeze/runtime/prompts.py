"""What the mask of a piece of a prompt says: where each row's first token stands, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.runtime.positions import Rope


def padding_of(
    mask: Tensor | None, before: int, end: int, oldest: int, window: int, known: Tensor | None
) -> Tensor | None:
    """[batch] int32, slots in front of each row's first token; None if there are none.

    mask: [batch or 1, 1, end - before, end - oldest], of transformers' sdpa, true where a token of the
    piece sees a slot; None for all before it in the window. oldest: the first slot that the mask is about.
    known: of earlier pieces, whose padding is that of this one. EnvironmentFault on any other mask.
    """
    if mask is None and known is None:
        return None
    if mask is None:
        raise _other()
    mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    slots = torch.arange(before, end, device=mask.device)[:, None]
    places = torch.arange(oldest, end, device=mask.device)
    padding = known
    if padding is None:
        own = mask.diagonal(before - oldest, dim1=1, dim2=2)
        padding = (
            (~own).sum(dim=1, dtype=torch.int32) if not before else own.new_zeros(len(own)).int()
        )
    start = padding[:, None, None]
    expected = (places <= slots) & (places >= start)
    if window:
        expected &= places > slots - window
    if not bool(((mask == expected) | (slots < start)).all()):
        raise _other()
    return padding if bool(padding.any()) else None


def _other() -> EnvironmentFault:
    return EnvironmentFault(
        "a cache in tiles takes prompts with padding in front of each row's first token alone, in the "
        "attention_mask of every piece, and no other mask; leave tokens out"
    )


def check_positions(rope: Rope, kind: str, end: int, padding: Tensor) -> None:
    """EnvironmentFault unless the piece that goes on counts positions from each row's first token."""
    ids, *_ = rope.seen[kind if rope.by_layer else None]
    if not bool((ids[:, -1] == end - 1 - padding).all()):
        raise EnvironmentFault(
            "rows with padding need position_ids that count from their first token, as generate gives them"
        )
