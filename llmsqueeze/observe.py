"""Watching a model's own attention: queries, keys and values as it computes with them.

By an attention function registered with transformers that looks on and then calls the one it stands for;
masks are made as for that one, too: transformers gives none at all to names that it does not know.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(before, own)(
            module, query, key, value, mask, **rest
        )

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
