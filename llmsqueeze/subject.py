"""A checkpoint made ready to be measured: weights, gates and KV cache as they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.policy import Policy
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import Gating, gating_of
from llmsqueeze.runtime.kv_cache import LayerFormat, attached_cache, packed_cache


@dataclass(frozen=True)
class Subject:
    """model; gating: what its gates share, if it has any; cache: makes the quantised KV cache of one pass,
    None where keys and values stay as they are."""

    model: Any
    gating: Gating | None
    cache: Callable[[], Any] | None


def prepare(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernels: bool,
    policy: Policy,
    kv_cache: LayerFormat | None = None,
    stored_cache: bool = True,
) -> Subject:
    """Load a checkpoint. policy: which tokens of a pass its gates see, whatever it does with prompts.

    kv_cache: the format to quantise with; without, stored_cache says whether the checkpoint's is used.
    Errors: those of runtime.load.
    """
    model = load(checkpoint, dtype, device, kernels=kernels)
    gating = gating_of(model)
    if gating:
        gating.policy = policy
    cache = None
    if kv_cache is not None:
        cache = lambda: packed_cache(model, kv_cache)  # noqa: E731
    elif stored_cache and checkpoint.kv_cache is not None:
        cache = lambda: attached_cache(model)  # noqa: E731
    return Subject(model, gating, cache)
