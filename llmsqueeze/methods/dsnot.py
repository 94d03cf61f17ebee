"""DSnoT: swap kept and removed weights of a row, changing no value. Zhang et al. (arXiv 2310.08915).

Starting from another method's mask, a removed weight is regrown and a kept one removed, so that every
row (every group for n:m) keeps its count. What a swap must achieve is `Config.swap`:

guarded    The row's expected error ε = Σ removed W_ij S_j, S_j the input summed over one sample, must
           shrink, and so must its expected square per token, as if inputs were uncorrelated:
           (ε / tokens)² + Σ removed W_ij² var(x_j). Regrown is the weight with the largest
           W_ij S_j / var(x_j) of ε's sign, removed the lowest Wanda score of the other sign. A row ends
           at its first swap that fails.
quadratic  The squared error Δ G Δᵀ on the calibration tokens must shrink, G their Gram matrix, Δ =
           -removed weights: no longer the paper's method, but far closer to what it is after.
released   What the published code does (github.com/zyxxmu/DSnoT, 4c029df), for comparison:
           - no test that a swap helps (--without_same_sign is on, also when given as False): |ε|
             grows in some rows, and the true error in most;
           - var(x_j) leaves out how the samples' means differ;
           - n:m removes the lowest initial score of the group whatever its sign, and ε must keep its
             first sign, which lets |ε| grow too.
           Its crashes on narrow rows, its pointers that run past the candidates and change the
           sparsity, and its SparseGPT start from a Hessian that it never fills are not reproduced.
           Its default edits attention only: `--ignore re:mlp` comes close, but leaves those linears
           dense rather than at the initial mask. A method does not see the names of its linears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import sparsegpt
from llmsqueeze.methods.base import NM, Pruned, Target
from llmsqueeze.methods.select import choose

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats

INITIAL = ("magnitude", "wanda", "sparsegpt")
SWAP = ("guarded", "quadratic", "released")

# Asking whether all rows are done makes the host wait for the device: not every cycle.
CHECK_EVERY = 10
# Pairs tried per row and cycle are those of so many best removed and kept weights. In rows of five
# linears of SmolLM2-135M this ended within 5 % of the error that trying all pairs ends at; the one best
# weight to regrow and then the best to remove for it, within 11 %.
SHORTLIST = 16
# Entries of the largest temporary; rows are independent, so more are done in turns.
CHUNK = 1 << 25


@dataclass(frozen=True)
class Config:
    initial: str = field(
        default="wanda",
        metadata={
            "help": "mask to start from: magnitude (within rows), wanda or sparsegpt",
            "choices": INITIAL,
        },
    )
    swap: str = field(
        default="guarded",
        metadata={
            "help": "what swaps must lower: guarded (the mean output error), quadratic (the "
            "squared one) or released (the published code: nothing)",
            "choices": SWAP,
        },
    )
    cycles: int = field(default=50, metadata={"help": "swaps per row, at most"})
    threshold: float = field(
        default=0.1,
        metadata={
            "help": "mean output error at which a row is done, summed over the tokens of a sample "
            "(not for quadratic)"
        },
    )

    def __post_init__(self) -> None:
        if self.initial not in INITIAL:
            raise RecipeError(
                f"unknown initial mask {self.initial!r}; choose from {', '.join(INITIAL)}"
            )
        if self.swap not in SWAP:
            raise RecipeError(f"unknown swap rule {self.swap!r}; choose from {', '.join(SWAP)}")
        if not 0 <= self.cycles <= 10_000:
            raise RecipeError(f"{self.cycles} cycles: the range is 0 to 10000, the usual value 50")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise RecipeError(
                f"threshold {self.threshold} must be finite and not negative; the usual value is 0.1"
            )


def needs(config: Config) -> frozenset[str]:
    wanted = {
        "guarded": {"sum", "sq_sum"},
        "quadratic": {"gram"},
        "released": {"sum", "sq_sum"},
    }[config.swap]
    return frozenset(
        wanted | {"wanda": {"sq_sum"}, "sparsegpt": {"gram"}}.get(config.initial, set())
    )


def prune(weight: Tensor, stats: InputStats | None, target: Target, config: Config) -> Pruned:
    """The initial mask, with at most `cycles` swaps in every row. Unstructured or n:m along inputs.

    weight: [out, in], any float dtype; kept entries come back bit-identical.
    stats: see `needs`; all samples must have as many tokens.
    report: swaps per row, and the mean over rows of |ε| or of the squared error per token.
    """
    from llmsqueeze.numerics.masks import zero_removed

    assert stats is not None
    group = _group(target)
    w = weight.float()
    score = _initial_score(w, stats, config)
    first = choose(score, target)
    if config.swap == "quadratic":
        keep, before, after = _swap_quadratic(w, first, stats, group, config)
        kind = "squared_error"
    else:
        keep, before, after = _swap_expected(w, first, stats, score, group, config)
        kind = "expected_error"
    report = {
        "swaps_per_row": float((keep & ~first).sum()) / keep.shape[0],
        f"{kind}_before": float(before.mean()),
        f"{kind}_after": float(after.mean()),
    }
    return Pruned(zero_removed(weight, keep), keep, report)


def _group(target: Target) -> int | None:
    """Consecutive inputs within which weights are swapped; None for the whole row."""
    if target.pattern is None:
        return None
    if isinstance(target.pattern, NM) and target.pattern.axis == "in":
        return target.pattern.m
    raise RecipeError(
        f"dsnot edits masks along the inputs of a row, which pattern {target.pattern} does not allow; "
        "use wanda, sparsegpt or admm"
    )


def _initial_score(w: Tensor, stats: InputStats, config: Config) -> Tensor:
    """[out, in]: what the first mask is ranked by."""
    if config.initial == "magnitude":
        return w.abs()
    if config.initial == "wanda":
        return w.abs() * stats.rms
    factor, _, dead = sparsegpt._factor(stats, sparsegpt.Config().damping)
    return (w.abs() / factor.diagonal()).masked_fill(dead, 0)


def _swap_expected(
    w: Tensor, first: Tensor, stats: InputStats, score: Tensor, group: int | None, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Guarded and released swaps: the mask, and |ε| per row before and after.

    Candidates have one key each, fixed for the whole run; a weight that changed state is none again.
    """
    import torch

    rows, columns = w.shape
    span = group or columns
    released = config.swap == "released"
    share = stats.sum / stats.samples
    contribution = w * share.float()
    # Signed keys: times the sign of ε, candidates are positive, the best one largest.
    regrow = contribution / _variance(stats, within_samples=released)
    regrow = regrow.masked_fill_(first, 0)
    by_sign = not (released and group)
    if by_sign:
        drop = -contribution.sign() / (w.abs() * stats.rms)
        drop = drop.masked_fill_(~first | (contribution == 0), 0)
    else:
        drop = (1 / score).masked_fill_(~first, 0)

    def effect(column: Tensor) -> Tensor:
        """[out, 1] fp64: the products again, so that ε does not drift from what the mask says."""
        return w.gather(1, column).double() * share[column]

    tokens = stats.count / stats.samples
    variance = _variance(stats, within_samples=False).double()

    def spread(column: Tensor) -> Tensor:
        """[out, 1] fp64: what removing this weight adds to the row's variance per token."""
        return w.gather(1, column).double().square() * variance[column]

    keep = first.clone()
    before = error = _expected_error(w, first, share)
    alive = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(config.cycles):
        if cycle and cycle % CHECK_EVERY == 0 and not bool(alive.any()):
            break
        sign = error.sign().float()
        partners = (drop * sign if by_sign else drop).reshape(rows, -1, span)
        partner, place = partners.max(dim=2)
        # Only groups that have a weight to give in exchange may regrow one.
        gain = (regrow * sign).reshape(partners.shape)
        gain = gain.masked_fill_(partner.unsqueeze(2) <= 0, 0).reshape(rows, columns)
        gained, grown = gain.max(dim=1, keepdim=True)
        block = grown // span
        removed = block * span + place.gather(1, block)
        changed = error + effect(removed) - effect(grown)
        alive = alive & (gained > 0) & (error.abs() > config.threshold)
        if not released:
            gap = (changed / tokens).square() - (error / tokens).square()
            alive &= (changed.abs() < error.abs()) & (gap + spread(removed) < spread(grown))
        elif group:
            alive &= changed.sign() == before.sign()
        _exchange(keep, grown, removed, alive)
        regrow.scatter_(1, grown, 0)
        drop.scatter_(1, removed, 0)
        error = torch.where(alive, changed, error)
    return keep, before.abs(), _expected_error(w, keep, share).abs()


def _variance(stats: InputStats, *, within_samples: bool) -> Tensor:
    """[in] fp32: variance of each input, over all tokens or as the mean of those within a sample."""
    import torch

    square = stats.sq_sum / stats.count
    if within_samples:
        tokens = stats.count / stats.samples
        variance = square - stats.sample_sq / (stats.samples * tokens**2)
    else:
        variance = square - (stats.sum / stats.count).square()
    # The squares are summed in fp32, so that an input which never varies may even come out negative.
    floor = (1e-6 * square).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.maximum(variance, floor).float()


def _expected_error(w: Tensor, keep: Tensor, share: Tensor) -> Tensor:
    """[out, 1] fp64: ε, what the removed weights put out on average over one sample."""
    return w.masked_fill(keep, 0).double() @ share.unsqueeze(1)


def _exchange(keep: Tensor, grown: Tensor, removed: Tensor, where: Tensor) -> None:
    """Set `grown` and clear `removed`, both [out, 1] columns, in the rows `where`. No host waits."""
    keep.scatter_(1, grown, keep.gather(1, grown) | where)
    keep.scatter_(1, removed, keep.gather(1, removed) & ~where)


class _SquaredError:
    """Δ G Δᵀ of every row while swaps change it.

    w: [out, in] fp32; first: the mask it starts from. residual: [out, in], (removed weights) G.
    least: [out, 1]; changes smaller than that are not gains but rounding of the error itself.
    """

    def __init__(self, w: Tensor, first: Tensor, gram: Tensor) -> None:
        self._w, self._gram = w, gram
        removed = w.masked_fill(first, 0)
        self.residual = removed @ gram
        self.least = 1e-6 * (self.residual * removed).sum(dim=1, keepdim=True)

    def swap(self, grown: Tensor, removed: Tensor, where: Tensor) -> None:
        """Make the swap in the rows `where`: [out, 1] bool."""
        up, down = self._w.gather(1, grown) * where, self._w.gather(1, removed) * where
        self.residual.addcmul_(down, self._gram[removed.squeeze(1)])
        self.residual.addcmul_(up, self._gram[grown.squeeze(1)], value=-1)


def _swap_quadratic(
    w: Tensor, first: Tensor, stats: InputStats, group: int | None, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy swaps on Δ G Δᵀ: the mask, and the error per token of each row before and after."""
    import torch

    gram, gram64 = stats.gram, stats.gram.double()

    def squared(rows: Tensor, keep: Tensor) -> Tensor:
        left = rows.masked_fill(keep, 0).double()
        return ((left @ gram64) * left).sum(dim=1)

    size = max(1, CHUNK // (w.shape[1] * (group or 1)))
    done = []
    for rows, start in zip(w.split(size), first.split(size), strict=True):
        keep = _descend(rows, start, gram, group, config.cycles)
        before, after = squared(rows, start), squared(rows, keep)
        # The descent is in fp32; nearly equal inputs could make its rounding larger than its gain.
        worse = after > before
        keep = torch.where(worse.unsqueeze(1), start, keep)
        done.append((keep, before / stats.count, torch.where(worse, before, after) / stats.count))
    keep, before, after = (torch.cat(parts) for parts in zip(*done, strict=True))
    return keep, before, after


def _descend(w: Tensor, first: Tensor, gram: Tensor, group: int | None, cycles: int) -> Tensor:
    """The best swap of each row, again and again, while it lowers the error."""
    import torch

    error = _SquaredError(w, first, gram)
    own = w.square() * gram.diagonal()
    cross = _cross_terms(w, gram, group) if group else None
    keep = first.clone()
    for cycle in range(cycles):
        # Of regrowing j and of removing p, each alone; together they also share -2 w_j w_p G_jp.
        pull = 2 * w * error.residual
        regrow = (own - pull).masked_fill_(keep, torch.inf)
        remove = (own + pull).masked_fill_(~keep, torch.inf)
        if cross is None:
            change, grown, removed = _best_pair(w, regrow, remove, gram)
        else:
            change, grown, removed = _best_pair_in_group(regrow, remove, cross)
        accept = change < -error.least
        if cycle % CHECK_EVERY == 0 and not bool(accept.any()):
            break
        _exchange(keep, grown, removed, accept)
        error.swap(grown, removed, accept)
    return keep


def _best_pair(
    w: Tensor, regrow: Tensor, remove: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[out, 1] each: the change of the error, the column to regrow and the one to remove."""
    count = min(SHORTLIST, w.shape[1])
    up, j = regrow.topk(count, dim=1, largest=False)
    down, p = remove.topk(count, dim=1, largest=False)
    shared = gram[j.unsqueeze(2), p.unsqueeze(1)]
    shared = shared * w.gather(1, j).unsqueeze(2) * w.gather(1, p).unsqueeze(1)
    table = up.unsqueeze(2) + down.unsqueeze(1) - 2 * shared
    change, at = table.flatten(1).min(dim=1, keepdim=True)
    return change, j.gather(1, at // count), p.gather(1, at % count)


def _cross_terms(w: Tensor, gram: Tensor, group: int) -> Tensor:
    """[out, groups, m, m]: -2 w_j w_p G_jp within every group."""
    count = gram.shape[0] // group
    blocks = gram.reshape(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = w.reshape(w.shape[0], count, group)
    return -2 * blocks * grouped.unsqueeze(3) * grouped.unsqueeze(2)


def _best_pair_in_group(
    regrow: Tensor, remove: Tensor, cross: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_best_pair`, from all pairs within a group: there are few."""
    shape, m = cross.shape[:3], cross.shape[3]
    table = regrow.reshape(shape).unsqueeze(3) + remove.reshape(shape).unsqueeze(2) + cross
    change, at = table.flatten(1).min(dim=1, keepdim=True)
    start = at // m**2 * m
    return change, start + at // m % m, start + at % m
