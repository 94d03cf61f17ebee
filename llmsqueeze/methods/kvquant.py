"""KVQuant: codebooks for keys by channel before the rotary embedding, and for values by token.

Hooper et al. (arXiv 2401.18079). Three things are ours, and `plain` leaves them out: entries count by how
attention reads them, rounding errors are passed on to channels that can make up for them
(numerics.feedback), and values are turned by a Hadamard matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.kv_codecs import TokenCodec

# Of the metric that errors are passed on by. On SmolLM2-135M, keys at 3 bits with one outlier slot,
# perplexity rose by 2.09 % at rank 2, 2.04 % at 4, 1.79 % at 8, 1.78 % with the full matrix (WikiText-2,
# H100).
RANK = 4
# Share of a channel's entries that its range leaves out when there are outlier slots. On SmolLM2-135M, keys
# at 4 bits with one slot, perplexity rose by 0.61 % at 0.002, 0.60 % at 0.004, 0.50 % at 0.01, and by 0.83 %
# where every layer chose what cost least on its calibration tokens (WikiText-2, 4 windows of 2048).
CLIPPED = 0.01
# Codes of so few bits are stretched to the mean and spread of what they stand for. On SmolLM2-135M at 2
# bits with one outlier slot, that took perplexity from 29.2 to 27.8 (by unweighted moments; WikiText-2,
# H100).
Q_NORM_BITS = 2


@dataclass(frozen=True)
class Config:
    fisher: bool = field(
        default=False,
        metadata={
            "help": "Weigh entries by the loss's squared gradient instead of by attention: a backward pass "
            "over the whole model."
        },
    )
    plain: bool = field(
        default=False,
        metadata={
            "help": "Nearer to the published method: equal weights, nearest codes, values not rotated."
        },
    )


def slots(share: float, width: int) -> int:
    """Outlier slots of every token and head that a share of the entries makes: at least one, unless 0."""
    return max(1, round(share * width)) if share else 0


def fit_keys(
    keys: Tensor, at: Tensor, senses: Tensor, bits: int, slots: int, config: Config
) -> dict[str, Tensor]:
    """Tensors of one layer as kv_record names them, after their layer.

    keys: [H, N, D] before the rotary embedding. at: [H, n], which of them `senses` [H, n, D] belong to: the
    directions that their errors act in, so that Σ (senses · error)² is what an error costs.
    """
    import torch

    from llmsqueeze.numerics.kmeans import WeightedHistogram

    read = keys.gather(1, at[..., None].expand(-1, -1, keys.shape[-1]))
    weights = senses.square()
    offset, scale = _range(keys, CLIPPED if slots else 0.0)
    unit, felt = (read - offset[:, None]) / scale[:, None], weights * scale[:, None].square()
    histogram = WeightedHistogram(-1, 1, keys.device)
    histogram.update(unit, felt)
    encode = histogram.codebook(2**bits)
    decode = encode
    if bits <= Q_NORM_BITS:
        decode = _stretched(encode, unit, felt)
    tensors = {
        "key_offset": offset.half(),
        "key_scale": scale.half(),
        "key_encode": encode.float(),
        "key_decode": decode.float(),
    }
    if not config.plain:
        from llmsqueeze.numerics.feedback import factorise

        senses = senses * scale[:, None]
        diagonal, factors = factorise(senses.mT @ senses, min(RANK, keys.shape[-1]))
        size = (diagonal + factors.square().sum(-1)).mean(-1).clamp_min(1e-300)
        least = float(torch.finfo(torch.float16).smallest_normal)
        tensors["key_diagonal"] = (diagonal / size[:, None]).clamp_min(least).half()
        tensors["key_factors"] = (factors / size.sqrt()[:, None, None]).half()
    return tensors


def fit_values(values: Tensor, codec: TokenCodec) -> dict[str, Tensor]:
    """The codebook of one layer's values [samples, H, T, D], in the units that `codec` puts them in."""
    from llmsqueeze.numerics.kmeans import WeightedHistogram

    histogram = WeightedHistogram(-1, 1, values.device)
    units: list[tuple[Tensor, Tensor]] = []
    for sample in values:
        x, offset, scale, outliers = codec.normalise(sample[None])
        unit = (x - offset.double()) / scale.double()
        weights = scale.double().square().expand_as(unit)
        if outliers is not None:
            weights = weights.scatter(-1, outliers, 0.0)
        histogram.update(unit, weights)
        if codec.book.bits <= Q_NORM_BITS:
            units.append((unit, weights))
    encode = histogram.codebook(2**codec.book.bits)
    decode = encode
    if units:
        import torch

        decode = _stretched(encode, *map(torch.cat, zip(*units, strict=True)))
    return {"value_encode": encode.float(), "value_decode": decode.float()}


def _range(keys: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Offset and scale [H, D] of every channel, whose range leaves out a share of its entries.

    Rounded as they are stored.
    """
    from llmsqueeze.numerics.kv_codecs import span

    beyond = int(share / 2 * keys.shape[1]) + 1
    high = keys.topk(beyond, dim=1).values[:, -1]
    low = keys.topk(beyond, dim=1, largest=False).values[:, -1]
    offset, scale = span(low, high)
    return offset.float(), scale.float()


def _stretched(encode: Tensor, unit: Tensor, weights: Tensor) -> Tensor:
    """Q-Norm (the paper's appendix), weighted as the codebook is: the codes' values with the mean and the
    spread of what lies in range."""
    from llmsqueeze.numerics.codebook import nearest

    weights = weights.double() * (unit.abs() <= 1)
    weights = weights / weights.sum().clamp_min(1e-300)
    unit = unit.double()
    coded = encode.to(unit)[nearest(unit, encode).long()]
    means, spreads = [], []
    for x in (unit, coded):
        mean = (weights * x).sum()
        means.append(mean)
        spreads.append((weights * (x - mean).square()).sum().sqrt())
    stretch = spreads[0] / spreads[1].clamp_min(1e-30)
    return encode * stretch.cpu() + (means[0] - means[1] * stretch).cpu()
