"""Which layers of a model cache keys and values that can be coded, and how far back each one looks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmsqueeze.errors import RecipeError


@dataclass(frozen=True)
class Span:
    """window: a token sees itself and those before it, so many in all; 0: all of them. kind: what
    transformers calls the layer's attention, for rotary embeddings that differ by it."""

    window: int
    kind: str


def spans(config: PretrainedConfig) -> dict[int, Span]:
    """Layer → span, of full and of sliding attention; others are left out."""
    config = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if not layers:  # a config without layer types: all are of full attention
        layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    found = {}
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if type(layer) is DynamicLayer:
            found[index] = Span(0, "full_attention")
        elif type(layer) is DynamicSlidingWindowLayer and kind in (None, "sliding_attention"):
            found[index] = Span(layer.sliding_window, "sliding_attention")
    return found


def coded_spans(config: PretrainedConfig) -> dict[int, Span]:
    """spans(); RecipeError if there is no such layer."""
    found = spans(config)
    if not found:
        raise RecipeError(
            "this model has no layer of full or sliding attention, whose cache could be packed"
        )
    return found
