"""Attention functions that stand for a model's own and call it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def register(name: str, base: str, attend: Callable[..., Any]) -> None:
    """Make `attend` known to transformers under a name, with masks as made for `base`.

    transformers gives no mask at all to names that it does not know.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def function_of(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function `base` for a module: eager ones are the model's own."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, own)
    return found
