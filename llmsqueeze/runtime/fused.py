"""Several linears of one input as one module, while the model still calls each by its name."""

from __future__ import annotations

from torch import Tensor, nn


class Fused(nn.Module):  # type: ignore[misc]
    """Several linears of one input as one. product: their outputs, one after another."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product
        self._last: tuple[Tensor, Tensor] | None = None

    def outputs(self, x: Tensor, last: bool, residual: Tensor | None = None) -> Tensor:
        """Of all of them. They are called in turn with the same tensor: the work is done once."""
        known = self._last
        y: Tensor = known[1] if known is not None and known[0] is x else self.product(x, residual)
        # Nothing is kept beyond the last call: a plain reference, which torch.compile understands.
        self._last = None if last else (x, y)
        return y


class FusedPart(nn.Module):  # type: ignore[misc]
    """One of the linears that Fused stands for: rows begin to end of its output."""

    def __init__(self, fused: Fused, begin: int, end: int, *, last: bool) -> None:
        super().__init__()
        self.fused = fused
        self.begin, self.end, self.last = begin, end, last
        self.in_features, self.out_features = fused.product.in_features, end - begin

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.outputs(x, self.last)[..., self.begin : self.end]
