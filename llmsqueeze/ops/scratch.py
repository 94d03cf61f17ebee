"""Memory for what is made and used at once, kept from one call to the next."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(rows: int, columns: int, dtype: torch.dtype, keep: int) -> Tensor:
    """[rows, columns], of any contents, that this thread's next call may overwrite.

    keep: bytes up to which it gets the same memory again. The system takes several times as long to give new
    memory as it takes to make a panel of weights dense in it.
    """
    needed = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_kept, "held", None)
    if held is None or held.numel() < needed:
        with torch.inference_mode(False):  # or only inference could use it
            held = torch.empty(needed, dtype=torch.uint8)
        if needed <= keep:
            _kept.held = held
    return held[:needed].view(dtype).view(rows, columns)
