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

    x: [..., in], any float dtype; threshold: [in] fp32, -1 keeps all, inf none. NaN, and infinity that
    would be dropped, come out as NaN: they show instead of vanishing.
    """
    return keep_above(x, round_down(threshold, x.dtype))


def keep_above(x: Tensor, limit: Tensor) -> Tensor:
    """gate() with a threshold that is already in x's dtype; see round_down."""
    if x.requires_grad:
        return x * (x.abs() > limit)
    # Comparing into the result's own dtype and multiplying is vectorised; selecting by a boolean mask
    # is not, and took ten times as long on a CPU.
    return torch.gt(x.abs(), limit, out=torch.empty_like(x)).mul_(x)


def round_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest values of `dtype` up to these fp32 thresholds: numbers of that dtype exceed both or none.

    Negative thresholds may round up, but stay negative, and every magnitude exceeds them.
    """
    rounded = threshold.to(dtype)
    if dtype.itemsize >= threshold.dtype.itemsize:
        return rounded
    # One step down is one less in the bits of a positive float.
    above = (rounded.to(threshold.dtype) > threshold) & (rounded > 0)
    return (rounded.view(torch.int16) - above.to(torch.int16)).view(dtype)


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
