"""What a layer's keys and values look like, and which errors of them attention would notice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmsqueeze.blocks import LoadedBlock, Run
from llmsqueeze.errors import CalibrationError
from llmsqueeze.numerics.rope import unrotate
from llmsqueeze.observe import Attention, observing
from llmsqueeze.parts import Split
from llmsqueeze.runtime.positions import rope_of
from llmsqueeze.runtime.spans import spans

# Queries of every sample and head that are looked at, and keys drawn for each by how much it reads them.
QUERIES, DRAWS = 128, 8
# Values, and gradients of the loss, are kept of every so many tokens.
STRIDE = 4


@dataclass
class Seen:
    """Of one layer, over samples in their order: keys before the rotary embedding and some of the values,
    [samples, heads, tokens, D] each; at, senses: see methods.kvquant.fit_keys, [heads, n] and [heads, n, D].
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    at: list[Tensor] = field(default_factory=list)
    senses: list[Tensor] = field(default_factory=list)


def tables(
    model: Any, length: int, dtype: torch.dtype, device: torch.device
) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer → cos and sin [length, R] fp32 of the first positions; of none without rotary embedding."""
    rope = rope_of(model)
    if rope is None:
        return {}
    ids = torch.arange(length, device=device)[None]
    known = spans(model.config)
    kinds = {span.kind if rope.by_layer else None for span in known.values()}
    found = {kind: [t[0].float() for t in rope.at(ids, kind, dtype)] for kind in kinds}
    return {
        layer: (cos, sin)
        for layer, span in known.items()
        for cos, sin in [found[span.kind if rope.by_layer else None]]
    }


def observe_block(
    loaded: LoadedBlock,
    batches: list[slice],
    turn: tuple[Tensor, Tensor] | None,
    *,
    sinks: int,
    sensing: bool,
) -> Seen:
    """Run the block over the calibration tokens, once; its activations then are those of the next one.

    turn: of tables(), this layer's. sinks: first tokens of every sample, which do not count. sensing:
    whether to draw pairs of queries and keys as attention does, whose queries are the directions that a
    key's error acts in: the second derivative of softmax, p (1 − p) q qᵀ.
    """
    run = loaded.run
    assert run is not None
    seen = Seen()

    def see(attention: Attention) -> None:
        keys, values = attention.key.float(), attention.value.float()
        first = sum(part.shape[0] for part in seen.keys)
        seen.keys.append((unrotate(keys, *turn) if turn else keys)[:, :, sinks:])
        seen.values.append(values[:, :, sinks::STRIDE].clone())
        if not sensing:
            return
        for row in range(keys.shape[0]):
            sample = first + row
            if loaded.samples is not None:
                sample = loaded.samples[sample]
            generator = torch.Generator().manual_seed(loaded.index << 20 | sample)
            at, senses = _draw(attention, row, turn, sinks, generator)
            seen.at.append(at + sample * (keys.shape[2] - sinks))
            seen.senses.append(senses)

    with observing(loaded.model.config, see):
        for rows in batches:
            _advance(run, rows)
    if not all(bool(x.isfinite().all()) for x in (*seen.keys, *seen.values)):
        raise CalibrationError(
            f"keys or values of {loaded.prefix}are NaN or Inf; try --dtype float32, or check the "
            "checkpoint with `llmsqueeze eval`"
        )
    return seen


def deal(
    layers: list[Seen], split: Split, heads: int, width: int, device: torch.device
) -> Seen | None:
    """Of some layers, at most one for each rank, all samples of this rank's one; None where there is none.

    layers: of every layer what this rank has seen, of its own samples; empty afterwards.
    """
    team, sensing = split.team, any(layer.senses for layer in layers)
    if team.size == 1:
        return layers[0]
    sensing = any(team.gather(sensing))
    order = [
        s for rank in range(team.size) for p in split.parts[rank :: team.size] for s in p.samples
    ]
    back = torch.tensor(order, device=device).argsort()
    found = Seen()
    for name in ("keys", "values", "at", "senses") if sensing else ("keys", "values"):
        join = torch.cat if name in ("keys", "values") else torch.stack
        given = [
            torch.empty(0, dtype=torch.int64 if name == "at" else torch.float32, device=device)
            for _ in range(team.size)
        ]
        for place, layer in enumerate(layers):
            own: list[Tensor] = getattr(layer, name)
            if own:
                given[place] = join(own).flatten()
                own.clear()
        dealt = team.deal(given)
        del given
        if team.rank >= len(layers):
            continue
        shape = (len(order), heads, -1) if name == "at" else (len(order), heads, -1, width)
        whole = dealt.view(shape)[back]
        setattr(found, name, [whole] if join is torch.cat else list(whole))
    return found if team.rank < len(layers) else None


def gradients(
    model: Any,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    turns: Mapping[int, tuple[Tensor, Tensor]],
    *,
    sinks: int,
    on_sample: Callable[[int, int], None],
) -> dict[int, Tensor]:
    """Layer → [heads, samples · kept tokens, D] fp32 on the CPU: the loss's gradient with respect to keys.

    blocks: the model's. One sample at a time, every block computed again on the way back, so that memory
    holds one block's activations. The loss is the sum over a sample's predictions.
    """
    found: dict[int, list[Tensor]] = {}

    def see(attention: Attention) -> None:
        def keep(gradient: Tensor, layer: int = attention.layer) -> None:
            own = gradient[0].float()
            own = unrotate(own, *turns[layer]) if layer in turns else own
            found.setdefault(layer, []).append(own[:, sinks::STRIDE].cpu())

        attention.key.register_hook(keep)

    device = next(model.parameters()).device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # transformers checkpoints activations in training mode only, which would switch dropout on.
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        with observing(model.config, see), torch.enable_grad():
            for index, sample in enumerate(tokens):
                ids = sample[None].to(device)
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
                logits = model(inputs_embeds=embedded, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[0, :-1].float(), ids[0, 1:], reduction="sum"
                )
                torch.autograd.backward(loss)
                on_sample(index + 1, len(tokens))
    finally:
        for block in blocks:
            del block.forward  # the class's own forward shows again
    return {layer: torch.cat(parts, dim=1) for layer, parts in found.items()}


def gradient_places(samples: int, length: int, heads: int) -> Tensor:
    """[heads, n]: which keys, of all samples in a row and without sinks, gradients() kept."""
    one = torch.arange(0, length, STRIDE)
    return torch.cat([one + sample * length for sample in range(samples)]).expand(heads, -1)


def _advance(run: Run, rows: slice) -> None:
    if run.last:
        run.forward(rows)
    else:
        run.propagate(rows)


def _draw(
    attention: Attention,
    row: int,
    turn: tuple[Tensor, Tensor] | None,
    sinks: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Places [heads, n] of drawn keys, counted without sinks, and [heads, n, D] what their queries see.

    A pair is drawn with a probability that goes with p (1 − p); how much of that a query has in all
    scales its vector, so that sums over pairs are means over what attention does.
    """
    query, key = attention.query[row].float(), attention.key[row].float()
    heads, length, width = key.shape
    group = query.shape[0] // heads
    places = torch.linspace(min(sinks + 1, length - 1), length - 1, QUERIES, device=key.device)
    places = places.long().unique()
    asked = query[:, places].view(heads, group, len(places), width)
    scores = asked @ key[:, None].mT * attention.scaling
    if attention.softcap:
        scores = attention.softcap * (scores / attention.softcap).tanh()
    causal = torch.arange(length, device=key.device) <= places[:, None]
    scores = scores.masked_fill(~causal, -torch.inf)
    if attention.mask is not None:
        mask = attention.mask[min(row, attention.mask.shape[0] - 1), :, places, :length]
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask.float()
    share = scores.softmax(dim=-1)
    pull = (share * (1 - share))[..., sinks:].flatten(0, 2)
    total = pull.sum(dim=-1)
    # Evenly spread through the sums up to every key, from a random start: the same on every device. A query
    # that sees sinks alone draws any key, with a vector of 0.
    below = pull.double().cumsum(dim=-1)
    start = torch.rand(len(pull), 1, generator=generator, dtype=torch.float64).to(pull.device)
    steps = torch.arange(DRAWS, device=pull.device)
    drawn = torch.searchsorted(below, (steps + start) / DRAWS * below[:, -1:])
    drawn = drawn.clamp_max(pull.shape[-1] - 1)
    vectors = asked.flatten(0, 2)[:, None].expand(-1, DRAWS, -1)
    if turn:
        cos, sin = turn
        vectors = unrotate(vectors, cos[drawn + sinks], sin[drawn + sinks])
    vectors = vectors * (total / DRAWS).sqrt()[:, None, None]
    return drawn.view(heads, -1), vectors.reshape(heads, -1, width)
