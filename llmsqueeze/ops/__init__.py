"""The operators of llmsqueeze. Their reference, in plain torch, is their specification."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("llmsqueeze", "DEF")
_LIBRARY.define("gate(Tensor x, Tensor threshold) -> Tensor")
_LIBRARY.define(
    "gated_linear(Tensor x, Tensor threshold, Tensor weight, Tensor? bias, Tensor? up, Tensor? down)"
    " -> Tensor"
)


def gate(x: Tensor, threshold: Tensor) -> Tensor:
    """x where |x_j| > threshold_j, compared in fp32, else 0.

    x: [..., in], any float dtype; threshold: [in] fp32, -1 keeps all, inf none. NaN is kept, so that it
    shows in the output instead of being dropped.
    """
    return x.masked_fill(x.abs().float() <= threshold, 0)


def gated_linear(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
) -> Tensor:
    """W gate(x) + b, and for what the gate dropped the low-rank branch up · down · (x - gate(x)).

    weight: [out, in]; bias: [out] or None; up: [out, rank] and down: [rank, in], both or neither.
    Everything but the threshold in x's dtype. Returns [..., out].
    """
    kept = gate(x, threshold)
    y = torch.nn.functional.linear(kept, weight, bias)
    if up is not None and down is not None:
        y = y + (x - kept) @ down.t() @ up.t()
    return y


def _gate_shape(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gated_linear_shape(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Until a device has its own kernel the reference runs there, too.
_LIBRARY.impl("gate", gate, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_linear", gated_linear, "CompositeExplicitAutograd")
torch.library.register_fake("llmsqueeze::gate", _gate_shape, lib=_LIBRARY)
torch.library.register_fake("llmsqueeze::gated_linear", _gated_linear_shape, lib=_LIBRARY)
