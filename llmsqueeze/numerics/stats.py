"""Statistics of what enters a linear: plain sums, so batches and devices merge by addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATISTICS = frozenset({"sum", "sq_sum", "gram", "product", "probe"})

# Tokens of every sample that are kept as they are, to measure a finished linear on.
PROBE_TOKENS = 32

_SLICE = 64

_SUMS = ("sum", "sample_sq", "sq_sum", "gram", "cross", "drift")


class InputStats:
    """Sums over the tokens of one input group (all linears fed by the same tensor).

    count, samples: tokens and samples seen. What is not in `needs` is not gathered, and reading it
    raises AttributeError:
    "sum"     sum [in] fp64, Σ x; sample_sq [in] fp64, Σ over samples of (Σ over its tokens of x)²
    "sq_sum"  sq_sum [in] fp64, Σ x²
    "gram"    gram [in, in] fp32, Σ x xᵀ
    "product" what product() needs beyond the gram, which must be gathered too
    "probe"   some of the tokens themselves, see probe()

    With "product", dense_share α > 0 follows the uncompressed model beside the compressed one:
    cross [in, in] fp32, Σ x̂ xᵀ, where x̂ is what the dense model has in place of x;
    drift [out, in] fp32, Σ (r̂ - r) xᵀ, r the residual stream that the linears add to; None where
    they do not write to it.
    """

    def __init__(
        self,
        width: int,
        needs: frozenset[str],
        device: torch.device,
        *,
        dense_share: float = 0.0,
        drift_width: int | None = None,
    ) -> None:
        unknown = needs - STATISTICS
        if unknown:
            raise ValueError(f"unknown statistics: {sorted(unknown)}")
        self.count = 0
        self.samples = 0
        self.needs = needs
        self.dense_share = dense_share
        # Sums over the tokens that are held out of fitting (they are in the sums here as well).
        self.held_out: InputStats | None = None
        # What methods derive from these sums and share between the linears of the group.
        self.memo: dict[Any, Any] = {}

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if "sum" in needs:
            self.sum = zeros(width, dtype=torch.float64)
            self.sample_sq = zeros(width, dtype=torch.float64)
        if "sq_sum" in needs:
            # fp64 across batches: masks then do not depend on how samples were batched.
            self.sq_sum = zeros(width, dtype=torch.float64)
        if "gram" in needs:
            self.gram = zeros(width, width)
        self.probes: list[Tensor] = []
        self.drift: Tensor | None = None
        if dense_share:
            self.cross = zeros(width, width)
            if drift_width is not None:
                self.drift = zeros(drift_width, width)

    def update(
        self,
        x: Tensor,
        dense_x: Tensor | None = None,
        drift: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> None:
        """Add the tokens of x: [samples, tokens, in], any float dtype.

        dense_x, of the same shape, and drift r̂ - r, [samples, tokens, out]: with a dense_share.
        lengths: how many tokens each sample has, where they differ; x is then [all tokens, in].
        """
        samples = x.shape[0] if lengths is None else len(lengths)
        self.samples += samples
        tokens = x.reshape(-1, x.shape[-1])
        self.count += tokens.shape[0]
        if "sum" in self.needs:
            if lengths is None:
                sums = x.double().sum(dim=1)
            else:
                sums = torch.stack([part.sum(dim=0) for part in x.double().split(lengths)])
            self.sum += sums.sum(dim=0)
            self.sample_sq += sums.square().sum(dim=0)
        if "sq_sum" in self.needs:
            self.sq_sum += _sum_of_squares(tokens.float())
        if "gram" in self.needs:
            _add_product(self.gram, tokens, tokens)
        if "probe" in self.needs:
            # Not the first token: in many models its activations dwarf all others.
            rows, count = (
                (x, PROBE_TOKENS) if lengths is None else (x[None], PROBE_TOKENS * samples)
            )
            some = _some(rows, count)
            self.probes.append(some.reshape(-1, x.shape[-1]).clone())
        if self.dense_share:
            assert dense_x is not None
            _add_product(self.cross, dense_x.reshape(tokens.shape), tokens)
            if self.drift is not None:
                assert drift is not None
                _add_product(self.drift, drift.reshape(-1, drift.shape[-1]), tokens)

    def clear(self) -> None:
        """Back to no tokens, in the same memory."""
        self.count = self.samples = 0
        for total in self.sums().values():
            total.zero_()
        self.probes = []

    def sums(self) -> dict[str, Tensor]:
        """By name, those that are gathered."""
        found = ((name, getattr(self, name, None)) for name in _SUMS)
        return {name: total for name, total in found if total is not None}

    def fitting(self) -> InputStats:
        """The sums without the held-out tokens; gram, and what product() needs."""
        if self.held_out is None:
            return self
        if "fitting" not in self.memo:
            rest = InputStats(0, frozenset(), torch.device("cpu"))
            rest.needs, rest.dense_share = self.needs, self.dense_share
            rest.count = self.count - self.held_out.count
            for name in ("gram", "cross", "drift", "sq_sum"):
                if getattr(self, name, None) is not None:
                    setattr(rest, name, getattr(self, name) - getattr(self.held_out, name))
            self.memo["fitting"] = rest
        fitting: InputStats = self.memo["fitting"]
        return fitting

    def merge(self, other: InputStats) -> None:
        """Add the sums of `other`, gathered from other tokens of the same input."""
        self.count += other.count
        self.samples += other.samples
        for name, mine in self.sums().items():
            mine += getattr(other, name)
        self.probes += other.probes

    def probe(self) -> Tensor:
        """[tokens, in], as they came in: evenly spaced tokens of every sample, of held-out ones if any."""
        return torch.cat((self.held_out or self).probes)

    def is_finite(self) -> bool:
        """False once any token held NaN or Inf, or a square left the range of fp32."""
        sums = [self.sq_sum] if "sq_sum" in self.needs else []
        if "gram" in self.needs:
            sums.append(self.gram.diagonal())
        return all(bool(torch.isfinite(s).all()) for s in sums)

    @property
    def rms(self) -> Tensor:
        """[in] fp32: root mean square of each input channel; 0 if there was no token."""
        sq_sum = self.sq_sum if "sq_sum" in self.needs else self.gram.diagonal().double()
        return (sq_sum / max(self.count, 1)).sqrt().float()

    def product(self, weight: Tensor) -> Tensor:
        """[out, in] fp32: Σ t xᵀ, t being what this weight ought to put out.

        Without a dense share t = W x. With share α, t = (1 - α) W x + α (W x̂ + r̂ - r): W x̂ is what the
        dense model puts out, and r̂ - r makes up for what its residual stream has and ours lacks.
        """
        weight = weight.float()
        if not self.dense_share:
            return weight @ self.gram
        mixed = (1 - self.dense_share) * self.gram + self.dense_share * self.cross
        wanted = weight @ mixed
        return wanted if self.drift is None else wanted + self.dense_share * self.drift


def _some(x: Tensor, count: int) -> Tensor:
    """At most so many tokens of every sample of x: [samples, tokens, in], evenly spaced."""
    step = max(1, x.shape[1] // count)
    return x[:, step // 2 :: step][:, :count]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ b, accumulated in fp32. a: [tokens, m], b: [tokens, n], the same float dtype."""
    if not len(a):  # no token of the batch was routed there
        return
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in fp32, so casting first would only cost time.
        total += torch.mm(a.t(), b, out_dtype=torch.float32)
    else:
        total.addmm_(a.t().float(), b.float())


def _sum_of_squares(x: Tensor) -> Tensor:
    """[in]: Σ x² over the rows of x: [tokens, in] fp32."""
    if x.is_cuda:
        return x.square().sum(dim=0)
    # Row slices into one small accumulator: no temporary of x's size, which on a CPU costs more
    # than the arithmetic, and every fp32 sum stays short.
    partial = torch.zeros(min(_SLICE, x.shape[0]), x.shape[1])
    for rows in x.split(_SLICE):
        partial[: rows.shape[0]].addcmul_(rows, rows)
    return partial.sum(dim=0, dtype=torch.float64)
