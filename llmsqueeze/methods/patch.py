"""PATCH: dense or 2:4 tiles, trained on the language-model loss. Hourri et al. (arXiv 2509.23410).

Mode "tile" learns which tiles stay dense and keeps the 2:4 mask it is given. Mode "joint" learns the
2:4 patterns as well; at sparsity 0.5 no tile stays dense and it is MaskLLM (arXiv 2409.17481).
Masks depend on every layer at once, so this is no WeightMethod: `llmsqueeze.train` runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.base import Target, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.soft_masks import Draw

MODES = ("tile", "joint")
ADAM_BETAS = (0.9, 0.95)  # both papers'
# The second word of every seed, so that no two uses of the first share their numbers.
_ORDER, _START, _NOISE = range(3)


@dataclass(frozen=True)
class Config:
    """Defaults are those of the PATCH code, which trained on 2 billion tokens."""

    mode: str = field(
        default="tile",
        metadata={
            "help": "tile: learn which tiles stay dense; joint: 2:4 as well",
            "choices": MODES,
        },
    )
    steps: int = field(default=2000, metadata={"help": "updates of the logits"})
    lr: float = field(default=1e-3, metadata={"help": "highest learning rate, after the warm-up"})
    warmup: int = field(default=5, metadata={"help": "steps over which the learning rate rises"})
    batch_tokens: int = field(
        default=2**20, metadata={"help": "tokens per update, to the nearest whole micro-batch"}
    )
    micro_batch: int = field(
        default=1, metadata={"help": "windows per forward pass; masks are drawn anew for each"}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "AdamW's, on the logits; MaskLLM used 0.1"}
    )
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm of an update"})
    temperature_start: float = field(
        default=4.0, metadata={"help": "temperature of both softmaxes at the first step"}
    )
    temperature_end: float = field(default=0.05, metadata={"help": "the same at the last step"})
    scale_start: float = field(
        default=100.0, metadata={"help": "factor on 2:4 logits at the first step"}
    )
    scale_end: float = field(default=500.0, metadata={"help": "the same at the last step"})
    tile_scale_start: float = field(
        default=25.0, metadata={"help": "factor on tile logits at the first step"}
    )
    tile_scale_end: float = field(default=350.0, metadata={"help": "the same at the last step"})
    init_std: float = field(
        default=0.014, metadata={"help": "standard deviation that initial logits are measured in"}
    )
    prior_strength: float = field(
        default=3.0,
        metadata={"help": "initial logits of the one-shot mask, in init_std; 0 starts at random"},
    )
    density_weight: float = field(
        default=7.0, metadata={"help": "weight of the distance from the wanted density in the loss"}
    )
    magnitude_weight: float = field(
        default=10.0,
        metadata={"help": "weight of the kept share of the weights' norm, which fades to 0"},
    )
    save_every: int = field(
        default=100, metadata={"help": "steps between two saves of the training state"}
    )
    seed: int = field(default=0, metadata={"help": "of the noise and of the order of the windows"})

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"mode {self.mode!r}; choose from {', '.join(MODES)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):
                continue
            words = f.name.replace("_", " ")
            if not math.isfinite(value) or value < 0:
                raise RecipeError(f"{words} {value} is not a number of at least 0")
            if value == 0 and f.name not in _MAY_BE_ZERO:
                raise RecipeError(f"{words} must be more than 0")
        if self.warmup > self.steps:
            raise RecipeError(f"a warm-up of {self.warmup} steps does not fit {self.steps} steps")


_MAY_BE_ZERO = frozenset(
    {"warmup", "weight_decay", "prior_strength", "density_weight", "magnitude_weight", "seed"}
)


def tile_of(config: Config, target: Target) -> Tile:
    """The target's tiles; RecipeError when it leaves nothing to learn or is not made of tiles."""
    if not isinstance(target.pattern, Tile):
        raise RecipeError(f"PATCH trains tiles, not {target.pattern_name}; use --pattern tile")
    if target.sparsity == 0:
        raise RecipeError("sparsity 0 leaves every tile dense; PATCH needs more, up to 0.5")
    if target.dense_tiles is not None:
        raise RecipeError("PATCH divides dense tiles among sites itself; give a sparsity only")
    if config.mode == "tile" and not has_gates(target):
        raise RecipeError(
            "sparsity 0.5 leaves no tile dense, so mode tile has nothing to learn; "
            "use a lower sparsity or mode joint"
        )
    return target.pattern


def has_gates(target: Target) -> bool:
    """Whether any tile may stay dense; without, it is MaskLLM."""
    return target.sparsity < 0.5


def passes(config: Config, seqlen: int) -> int:
    """Micro-batches per step: what brings their tokens nearest to batch_tokens, at least 1."""
    return max(1, round(config.batch_tokens / (seqlen * config.micro_batch)))


def windows(config: Config, shape: Sequence[int], step: int, index: int) -> list[int]:
    """Which samples pass `index` of a step sees: all of them in a seeded order, then in another.

    shape: samples, seqlen.
    """
    samples, seqlen = shape
    first = (step * passes(config, seqlen) + index) * config.micro_batch
    places = (divmod(n, samples) for n in range(first, first + config.micro_batch))
    return [_order(config.seed, epoch, samples)[place] for epoch, place in places]


def noise_seed(config: Config, step: int, index: int, number: int) -> int:
    """The seed of the noise of one forward pass. number: of the site; for tiles, the count of sites."""
    from llmsqueeze.numerics.soft_masks import seed_of

    return seed_of(config.seed, _NOISE, step, index, number)


def learning_rate(config: Config, step: int) -> float:
    """Warm-up, then half a cosine down to 0. step: counted from 0."""
    from llmsqueeze.numerics.soft_masks import warmup_cosine

    return config.lr * warmup_cosine(step, config.steps, config.warmup)


def gates_of(logits: Tensor, config: Config, step: int, seed: int) -> Tensor:
    """[tiles] soft gates at a step: temperature falls and scale rises linearly."""
    from llmsqueeze.numerics.soft_masks import ramp, soft_gates

    scale = ramp(config.tile_scale_start, config.tile_scale_end, step, config.steps)
    return soft_gates(logits, scale, _temperature(config, step), seed)


def draw_of(config: Config, step: int, seed: int) -> Draw:
    """How the 2:4 patterns are drawn at a step."""
    from llmsqueeze.numerics.soft_masks import Draw, ramp

    scale = ramp(config.scale_start, config.scale_end, step, config.steps)
    return Draw(scale, _temperature(config, step), seed)


def initial_tiles(
    benefit: Tensor | None, areas: Tensor, config: Config, target: Target, number: int
) -> Tensor:
    """[tiles] fp32 logits: those of highest benefit start on the dense side, as many as the target has.

    benefit: [tiles], of all sites, in one unit; None or strength 0: N(0, init_std²), seeded by number.
    """
    from llmsqueeze.numerics.soft_masks import highest_tiles, tile_prior

    if benefit is None or not config.prior_strength:
        return _random_logits(tuple(areas.shape), config, areas, number)
    dense = highest_tiles(benefit, areas, 1 - 2 * target.sparsity)
    return tile_prior(dense, config.init_std, config.prior_strength)


def initial_patterns(keep: Tensor, config: Config, number: int) -> Tensor:
    """[out, in/4, 6] fp32 logits that prefer the 2:4 mask `keep`; strength 0: as initial_tiles."""
    from llmsqueeze.numerics.soft_masks import PAIRS, pattern_prior

    if not config.prior_strength:
        shape = (keep.shape[0], keep.shape[1] // 4, len(PAIRS))
        return _random_logits(shape, config, keep, number)
    return pattern_prior(keep, config.init_std, config.prior_strength)


def soft_density(gates: Tensor, areas: Tensor) -> Tensor:
    """[] mean of the soft mask over all weights: (1 + ρ)/2, ρ the dense share of the area.

    Exact in every mode, since every soft 2:4 group adds up to 2. gates, areas: [tiles].
    """
    return 0.5 + 0.5 * (gates * areas).sum() / areas.sum()


def penalty(
    density: Tensor, kept_norm: Tensor, config: Config, target: Target, step: int
) -> Tensor:
    """[] what the loss gets beside the cross-entropy: λ_s·|ρ(m) - d| - λ_w·(1 - step/steps)·kept_norm.

    density: the soft mask's mean ρ(m). kept_norm: Σ_l‖m_l ⊙ W_l‖ / Σ_l‖W_l‖.
    """
    missed = (density - (1 - target.sparsity)).abs()
    fading = config.magnitude_weight * (1 - step / config.steps)
    return config.density_weight * missed - fading * kept_norm


def _temperature(config: Config, step: int) -> float:
    from llmsqueeze.numerics.soft_masks import ramp

    return ramp(config.temperature_start, config.temperature_end, step, config.steps)


def _random_logits(shape: tuple[int, ...], config: Config, like: Tensor, number: int) -> Tensor:
    import torch

    from llmsqueeze.numerics.soft_masks import seed_of

    generator = torch.Generator(like.device).manual_seed(seed_of(config.seed, _START, number))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=like.device)
    return config.init_std * noise


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def _order(seed: int, epoch: int, samples: int) -> list[int]:
    import torch

    from llmsqueeze.numerics.soft_masks import seed_of

    generator = torch.Generator().manual_seed(seed_of(seed, _ORDER, epoch))
    return torch.randperm(samples, generator=generator).tolist()
