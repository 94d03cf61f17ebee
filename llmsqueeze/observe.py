"""Watching a model's own attention: queries, keys and values as it computes with them.

By an attention function that looks on and then calls the one it stands for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmsqueeze import stand_in

NAME = "llmsqueeze_observed"


@dataclass(frozen=True)
class Attention:
    """One call. query: [batch, query heads, tokens, D]; key, value: [batch, heads, tokens, D], after the
    rotary embedding; mask: as the model made it, None for a causal one; softcap: of the scores, or None."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None


@contextlib.contextmanager
def observing(config: Any, see: Callable[[Attention], None]) -> Iterator[None]:
    """While this lasts, `see` is told of every attention that models of this config compute."""
    before = config._attn_implementation

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **rest: Any,
    ) -> Any:
        layer: Any = module.layer_idx
        scaling = rest.get("scaling")
        see(
            Attention(
                layer, query, key, value, mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling, rest.get("softcap"),
            )
        )  # fmt: skip
        return stand_in.function_of(before, module)(module, query, key, value, mask, **rest)

    stand_in.register(NAME, before, attend)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
