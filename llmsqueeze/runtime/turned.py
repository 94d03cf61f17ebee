"""Attention over keys and values that a Hadamard matrix turned.

Turning them back costs work for every cached token. Turning the query, or what attention puts out, is the
same, since the matrix is orthogonal and its own inverse, and costs work for the new tokens alone.

By an attention function that stands for the model's own and calls it. A packed cache marks what it returns
in the turned basis; unmarked tensors go through untouched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmsqueeze import stand_in
from llmsqueeze.numerics.hadamard import hadamard

_PREFIX = "llmsqueeze_turned_"
# What computes with keys and values as they are given. Others get them turned back.
_BASES = ("eager", "sdpa")


class Mark:
    """On a tensor: it is in the turned basis. seen: whether an attention function took notice."""

    def __init__(self) -> None:
        self.seen = False


def accept(config: Any) -> None:
    """Let models of this config compute with turned keys and values, if their attention can."""
    base = config._attn_implementation
    if base not in _BASES:
        return
    stand_in.register(_PREFIX + base, base, _attend(base))
    config._attn_implementation = _PREFIX + base


def accepted(config: Any) -> bool:
    """Whether attention undoes what is marked; another implementation may have been chosen since."""
    return str(config._attn_implementation).startswith(_PREFIX)


def mark(tensor: Tensor) -> Mark:
    """Say that a tensor is in the turned basis."""
    made = Mark()
    tensor.llmsqueeze_turned = made  # type: ignore[attr-defined]
    return made


def _attend(base: str) -> Any:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **rest: Any,
    ) -> Any:
        if _notice(key):
            query = hadamard(query)
        base_attention = stand_in.function_of(base, module)
        out, weights = base_attention(module, query, key, value, mask, **rest)
        return (hadamard(out) if _notice(value) else out), weights

    return attend


def _notice(tensor: Tensor) -> bool:
    made = getattr(tensor, "llmsqueeze_turned", None)
    if made is not None:
        made.seen = True
    return made is not None
