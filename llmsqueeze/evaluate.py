"""Perplexity, defined once: token_ppl@L over non-overlapping windows."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.device import exact_matmul
from llmsqueeze.errors import CalibrationError

# Positions whose logits are turned into losses together: small enough for a CPU cache.
LOSS_CHUNK = 64
# Windows are batched up to this many tokens on a GPU; a CPU takes one window at a time.
GPU_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Perplexity:
    """token_ppl: exp of the mean over windows of the mean cross-entropy of L-1 predictions.

    tokens: predictions counted. seconds: of the forward passes, loading aside.
    """

    token_ppl: float
    windows: int
    seqlen: int
    tokens: int
    seconds: float


@torch.inference_mode()
def perplexity(
    model: torch.nn.Module,
    windows: Tensor,
    on_window: Callable[[int, int], None] = lambda done, total: None,
    cache: Callable[[], Any] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on [windows, L] token ids.

    cache: makes the KV cache of a batch of windows, whose keys and values attention then sees; None for
    no cache. Logits are taken in the model's dtype, losses in fp32, their mean in fp64. Raises
    CalibrationError if a window's loss is not finite.
    """
    device = next(model.parameters()).device
    count, seqlen = windows.shape
    batch = 1 if device.type == "cpu" else max(1, GPU_BATCH_TOKENS // seqlen)
    started = time.monotonic()
    losses: list[float] = []
    with exact_matmul():
        for start in range(0, count, batch):
            ids = windows[start : start + batch].to(device)
            logits = model(ids, **cache_options(model, cache() if cache else None)).logits
            losses.extend(_window_losses(logits, ids).tolist())
            on_window(len(losses), count)
    if not all(math.isfinite(loss) for loss in losses):
        bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        raise CalibrationError(
            f"the loss of window {bad} is not finite: weights are damaged, or the dtype overflows "
            "(try --dtype float32)"
        )
    return Perplexity(
        token_ppl=math.exp(min(math.fsum(losses) / count, 700.0)),
        windows=count,
        seqlen=seqlen,
        tokens=count * (seqlen - 1),
        seconds=time.monotonic() - started,
    )


def cache_options(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """What gives a model a KV cache, or none. transformers 5.24 changed the argument's name."""
    if cache is None:
        return {"use_cache": False}
    known = inspect.signature(model.forward).parameters
    return {"use_cache": True, "cache" if "cache" in known else "past_key_values": cache}


def _window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[windows] fp64: mean cross-entropy of predicting ids[:, 1:] from logits[:, :-1]."""
    total = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
    last = ids.shape[1] - 1
    for start in range(0, last, LOSS_CHUNK):
        stop = min(start + LOSS_CHUNK, last)
        chunk = logits[:, start:stop].float()
        picked = chunk.gather(-1, ids[:, start + 1 : stop + 1].unsqueeze(-1)).squeeze(-1)
        total += (chunk.logsumexp(-1) - picked).sum(dim=1, dtype=torch.float64)
    return total / last
