"""Attention of single tokens by a kernel of our own: transformers copies caches whose keys queries share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmsqueeze import stand_in
from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.ops import attend_fits
from llmsqueeze.runtime.tiles import Hub

_NAME = "llmsqueeze_attend"
_BASE = "sdpa"
# Sequences times kv heads that a step may have.
_COUNTERS = 4096
# Arguments that make attention something else.
_CHANGES = ("softcap", "s_aux", "position_bias")


def accept(model: nn.Module) -> None:
    """Let a model on a GPU attend by the kernel when it decodes; whatever has none stays as it is."""
    config: Any = model.config
    # A config may have been through this with another model.
    known = config._attn_implementation in (_BASE, _NAME)
    if known and next(model.parameters()).device.type == "cuda":
        install(model)


def install(model: nn.Module) -> None:
    """accept(), wherever the model is; on a CPU the operator runs its reference."""
    config: Any = model.config
    device = next(model.parameters()).device
    fresh = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    hub = Hub()
    for module in model.modules():
        known = getattr(module, "llmsqueeze_counters", None)
        # A graph that was captured before works with those that are there.
        if hasattr(module, "is_causal") and (known is None or known.device != device):
            module.register_buffer("llmsqueeze_counters", fresh, persistent=False)
            module.llmsqueeze_hub = hub
    stand_in.register(_NAME, _BASE, attend)
    config._attn_implementation = _NAME


def over_tiles(model: nn.Module) -> tuple[Hub, Tensor]:
    """install() for a cache in tiles: what that works with. EnvironmentFault if attention is not ours."""
    config: Any = model.config
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        raise EnvironmentFault(
            "no kernel attends over tiles with capped scores, as this model does"
        )
    if config._attn_implementation in (_BASE, _NAME):
        install(model)
        for module in model.modules():
            if hasattr(module, "llmsqueeze_hub"):
                return module.llmsqueeze_hub, module.llmsqueeze_counters
    raise EnvironmentFault(
        "this model's attention is not transformers' sdpa, and cannot attend over a cache in tiles"
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: by the kernel where it can, else by its own."""
    plain = not dropout and all(rest.get(name) is None for name in _CHANGES)
    hub: Hub | None = getattr(module, "llmsqueeze_hub", None)
    if hub is not None and (hub.active is not None or hub.piece is not None):
        layer, piece = hub.active, hub.piece
        hub.clear()
        if not plain:
            raise EnvironmentFault("no kernel for this model's attention attends over tiles")
        if layer is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return layer.attend(query, scale), None
        assert piece is not None
        mask = piece.layer.take(piece, mask)
    known = hasattr(module, "llmsqueeze_counters") and len(query) * key.shape[1] <= _COUNTERS
    if plain and known and attend_fits(query, key, value, mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        counters = module.llmsqueeze_counters
        y: Tensor = torch.ops.llmsqueeze.attend(query, key, value, mask, counters, scale)
        return y, None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **rest
    )
    return found
