"""What calibration holds at once, counted from shapes: nothing is read, and no factor is fitted.

Activations of the model are counted tensor by tensor, as a block's forward has them alive where it enters a
linear; statistics and solvers as their modules allocate. Where another architecture keeps one more or one
less, the count is off by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from llmsqueeze.blocks import batch_samples
from llmsqueeze.checkpoint import Checkpoint, PackedSource
from llmsqueeze.kv_calibration import DRAWS, QUERIES
from llmsqueeze.numerics.kmeans import BINS
from llmsqueeze.numerics.stats import PROBE_TOKENS
from llmsqueeze.recipe import PruneRecipe, is_ignored
from llmsqueeze.shards import SHARD_BYTES
from llmsqueeze.traffic import stored_bytes

FP32 = 4
# Square tables in fp64 that optimal k-means on a line has at once; see numerics.kmeans.
KMEANS_TABLES = 6


@dataclass(frozen=True)
class Walk:
    """A walk over the blocks. item: bytes of a number that it computes with; followed: models, 1 or 2 with
    the dense one; at_once: samples per forward pass; parked: between blocks activations wait elsewhere."""

    samples: int
    seqlen: int
    at_once: int
    item: int
    followed: int = 1
    parked: bool = False

    @classmethod
    def of(
        cls, samples: int, seqlen: int, batch: int, dtype: torch.dtype, device: torch.device,
        followed: int = 1, parked: bool = False,
    ) -> Walk:  # fmt: skip
        at_once = min(samples, batch or batch_samples(seqlen, device))
        return cls(samples, seqlen, at_once, dtype.itemsize, followed, parked)

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen

    @property
    def batch_tokens(self) -> int:
        return self.at_once * self.seqlen

    @property
    def waiting(self) -> int:
        """Tokens whose activations are held between two blocks."""
        return self.batch_tokens if self.parked else self.tokens * self.followed


@dataclass(frozen=True)
class _Group:
    """Linears fed by one tensor. entered: numbers a token that the block's forward holds where it enters
    them, what comes in from the block before aside; drift: outputs, if they write to the residual stream."""

    width: int
    rows: int
    entered: int
    drift: int


def prune_bytes(checkpoint: Checkpoint, recipe: PruneRecipe, walk: Walk, held_out: int) -> int:
    """Of a walk that prunes: the most of its groups, each while its widest linear is solved for."""
    needs = recipe.needs
    hidden = _hidden(checkpoint)
    between = walk.waiting * hidden * walk.item
    weights = _block_weights(checkpoint) * walk.item * walk.followed
    groups = _groups(checkpoint, recipe.ignore)
    of_each = min(PROBE_TOKENS, walk.seqlen)
    probe = (held_out or walk.samples) * of_each
    probes = probe * walk.item
    kept = walk.tokens if recipe.order == "group" else walk.batch_tokens
    peaks = []
    solving, measuring = 3 if held_out else 1, 3 if held_out else 2
    every = sum(_statistics(g, needs, recipe, solving, probes) for g in groups)
    sums = [_statistics(g, needs, recipe, measuring, probes) for g in groups]
    for group in groups:
        inside = kept * group.entered * walk.item * walk.followed
        own = _statistics(group, needs, recipe, solving, probes)
        if recipe.order == "block":
            inside, own = 0, every
        peaks.append(inside + own + _solver(group, recipe, probe))
    # The forward of one batch, in the midst of the others; sums are of fp32 copies of what it puts in.
    forward = walk.batch_tokens * _inside(checkpoint) * walk.item
    if walk.item < FP32:
        forward += walk.batch_tokens * max(g.width for g in groups) * 2 * FP32
    if recipe.order == "block":
        peaks.append(sum(sums) + forward + kept * max(g.entered for g in groups) * walk.item)
    else:
        inside = (kept * walk.followed - walk.batch_tokens) * walk.item
        peaks.append(
            max(inside * g.entered + s for g, s in zip(groups, sums, strict=True)) + forward
        )
    return between + weights + max(peaks)


def gate_bytes(checkpoint: Checkpoint, walk: Walk) -> int:
    """Of a walk that calibrates gates: one batch inside a block, and a histogram of what it sees."""
    widest = max(group.width for group in _groups(checkpoint))
    # Magnitudes, their scaled copy and bits in fp32 and int32, the bin of each in int64.
    histogram = walk.batch_tokens * widest * (3 * FP32 + 8)
    forward = walk.batch_tokens * _inside(checkpoint) * walk.item
    return _plain_walk(checkpoint, walk) + forward + histogram


def kv_bytes(checkpoint: Checkpoint, walk: Walk) -> int:
    """Of a walk that calibrates a KV cache: a layer's keys and values, and the queries that read them."""
    heads, groups, width = attention_shape(checkpoint)
    seen = walk.tokens * groups * width * FP32
    drawn = walk.samples * heads * min(QUERIES, walk.seqlen) * DRAWS * width * FP32
    # Keys, a transposed copy, a quarter of the values; what was drawn as a list and as one tensor, the keys
    # it reads, weights, both in units of the channel; and the histogram: bins in int64, a product, fp64.
    fitting = 2 * seen + seen // 4 + (6 + 2 + 1 + 2) * drawn
    fitting += KMEANS_TABLES * BINS**2 * 8
    forward = walk.batch_tokens * _inside(checkpoint) * walk.item
    return _plain_walk(checkpoint, walk) + max(forward + seen, fitting)


def embedding_bytes(checkpoint: Checkpoint, walk: Walk) -> int:
    """Before the first block: what is embedded, by a copy in the dtype of the computation."""
    dtype = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}[walk.item]
    table = checkpoint.model.get_input_embeddings().weight.numel()
    copied = 0 if checkpoint.dtype in dtype else table * walk.item
    return copied + walk.waiting * _hidden(checkpoint) * walk.item


def reading_bytes(checkpoint: Checkpoint) -> int:
    """Pages of the source that are mapped because they are read: of two blocks."""
    return 2 * sum(stored_bytes(checkpoint, name) for name in checkpoint.block_parameters(0))


def waiting_bytes(checkpoint: Checkpoint, written: int, *, changed: bool) -> int:
    """Pages of the source of what no file has yet, of tensors that are written as they were read.

    written: bytes of all tensors; changed: whether linears are, so that of a block what becomes of it is held
    instead.
    """
    if changed:  # they are read for the state of the run if not before, and share a file with what is changed
        outer = sum(stored_bytes(checkpoint, name) for name in checkpoint.outer_parameters)
        return min(outer, SHARD_BYTES - pending_bytes(checkpoint, written, changed=True))
    return round(checkpoint.stored_bytes * min(1.0, SHARD_BYTES / max(written, 1)))


def result_bytes(checkpoint: Checkpoint) -> int:
    """Of one block's weights as they become, in the dtype that is stored."""
    names = checkpoint.block_parameters(0)
    return sum(
        checkpoint.model.get_parameter(n).numel() * checkpoint.site_dtype(n).itemsize for n in names
    )


def pending_bytes(checkpoint: Checkpoint, written: int, *, changed: bool) -> int:
    """Finished tensors that no file has yet, those aside that still lie in the source as they are.

    written: bytes of all; changed: whether linears are.
    """
    plain = [n for n, source in checkpoint.sources.items() if not isinstance(source, PackedSource)]
    if changed:
        plain = [name for name in plain if name in checkpoint.outer_parameters]
    lying = sum(stored_bytes(checkpoint, name) for name in plain)
    return min(max(0, written - lying), SHARD_BYTES)


def encoding_bytes(checkpoint: Checkpoint) -> int:
    """Of one linear while it is put into its smallest encoding: in fp32, rounded, and its bits."""
    return max(module.weight.numel() for module in _linears(checkpoint)) * (3 * FP32)


def attention_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Heads, key-value heads and their width, as config.json has them."""
    config = checkpoint.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(config, "head_dim", None) or _hidden(checkpoint) // heads


def _plain_walk(checkpoint: Checkpoint, walk: Walk) -> int:
    between = walk.tokens * _hidden(checkpoint) * walk.item
    return between + _block_weights(checkpoint) * walk.item


def _statistics(
    group: _Group, needs: frozenset[str], recipe: PruneRecipe, copies: int, probes: int
) -> int:
    """Of one input group: some tokens as they came, and so many copies of sums. While it is measured, those
    of all tokens, of the part that is measured, and of those held out if there are any; when it is solved
    for, the part's are gone, and where tokens are held out those of the rest are there instead."""
    squares = group.width * ("gram" in needs)
    if "product" in needs and recipe.dense_share:
        squares += group.width + group.drift
    return copies * squares * group.width * FP32 + probes * group.width


def _solver(group: _Group, recipe: PruneRecipe, probe: int) -> int:
    """What a method, a refit and the final check allocate for a linear, the most at once."""
    square, matrix = group.width**2 * FP32, group.rows * group.width * FP32
    # The error of the result: tokens; both weights and their difference, or one, and squares of outputs.
    check = probe * group.width * FP32 + matrix + max(2 * matrix, 2 * probe * group.rows * FP32)
    # Scores, those of each row in another order, which stay; magnitude and Wanda do no more.
    steps = [check, 4 * matrix]
    inverse = 0
    if recipe.method == "sparsegpt":
        inverse = square
        # Hessian, what is factorised or inverted, the result, LAPACK's copy; then the weights.
        steps += [4 * square, square + 3 * matrix]
    elif recipe.method == "admm":
        inverse = square
        # What is inverted, its factor, the inverse, LAPACK's copy; then w, both targets, their gap, masks and
        # the scores that they are chosen from, some in another order.
        steps += [4 * square, square + 7 * matrix]
    if recipe.refit != "none":
        # Two problems, of two matrices each; start, mask, iterate, residual, direction, its product, best.
        steps.append(inverse + square + 12 * matrix)
    return max(steps)


def _groups(checkpoint: Checkpoint, ignore: tuple[str, ...] = ()) -> list[_Group]:
    """Input groups of the first block: linears of one width under one parent, in the order of the model.
    Those of which every block's are ignored are left out, unless none is left: later blocks then have others.

    Where a forward enters the first of a parent's linears it holds that parent's input beside the residual
    stream; where it enters the last, in attention, also queries, keys and values.
    """
    hidden = _hidden(checkpoint)
    linears = checkpoint.linears(0)
    # The last one under its parent that puts out the residual stream's width writes to it.
    last = {n.rpartition(".")[0]: n for n, m in linears.items() if m.out_features == hidden}
    found: dict[tuple[str, bool], dict[str, nn.Linear]] = {}
    for name, module in linears.items():
        parent = name.rpartition(".")[0]
        found.setdefault((parent, last.get(parent) == name), {})[name] = module
    groups, asked = [], []
    for (parent, writes), named in found.items():
        modules = list(named.values())
        width = max(m.in_features for m in modules)
        entered = 2 * hidden
        if writes:
            attention = "attn" in parent or "attention" in parent
            before = list(found.get((parent, False), {}).values())
            entered = hidden + width
            if attention:
                entered += sum(m.out_features for m in before)
            else:  # gate and up in one linear are views of what it put out
                entered += hidden + sum(m.out_features for m in before if m.out_features > width)
        groups.append(
            _Group(width, max(m.out_features for m in modules), entered, hidden if writes else 0)
        )
        if any(_is_asked(checkpoint, name, ignore) for name in named):
            asked.append(groups[-1])
    return asked or groups


def _is_asked(checkpoint: Checkpoint, name: str, ignore: tuple[str, ...]) -> bool:
    """Whether some block has a linear like this one of the first that is not ignored."""
    path = checkpoint.blocks_path
    within = name.removeprefix(f"{path}.0.")
    return any(
        not is_ignored(f"{path}.{index}.{within}", ignore)
        for index in range(checkpoint.block_count)
    )


def _inside(checkpoint: Checkpoint) -> int:
    """Numbers a token in the widest place of a block's forward: an MLP's products and their activation."""
    hidden = _hidden(checkpoint)
    return 3 * max(m.in_features for m in _linears(checkpoint)) + 3 * hidden


def _linears(checkpoint: Checkpoint) -> list[nn.Linear]:
    return list(checkpoint.linears(0).values())


def _hidden(checkpoint: Checkpoint) -> int:
    return int(checkpoint.model.get_input_embeddings().weight.shape[1])


def _block_weights(checkpoint: Checkpoint) -> int:
    parameters = (checkpoint.model.get_parameter(n) for n in checkpoint.block_parameters(0))
    return sum(prod(parameter.shape) for parameter in parameters)
