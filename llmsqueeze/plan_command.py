"""`llmsqueeze plan`: what a checkpoint will take of a GPU, before it is there."""

from __future__ import annotations

from pathlib import Path

import click

from llmsqueeze.command import CHECKPOINT_HELP, checkpoint_options, common, open_checkpoint
from llmsqueeze.conditions import parse_size
from llmsqueeze.console import Console
from llmsqueeze.errors import RecipeError


@click.command(
    help=f"""Say what CHECKPOINT takes of a GPU while it decodes, and which context fits.

{CHECKPOINT_HELP}

Reads headers, not weights. The cache is exact; weights with zeros are estimated, to about a tenth.
Without --memory the GPU here is asked what it has free.
"""
)
@click.argument("checkpoint")
@click.option("--context", type=int, default=8192, show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once.")
@click.option("--memory", metavar="SIZE", help="Of the GPU, as in 24GB.")
@checkpoint_options
@common
def plan(
    console: Console, checkpoint: str, context: int, batch: int, memory: str | None, offline: bool,
    cache_dir: Path,
) -> None:  # fmt: skip
    if min(context, batch) < 1:
        raise RecipeError(f"--context {context} --batch {batch}: both must be at least 1")
    given = None if memory is None else parse_size(memory)

    import torch

    from llmsqueeze.capacity import RESERVE, capacity
    from llmsqueeze.console import facts, size

    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    found = capacity(opened)
    if given is None and torch.cuda.is_available():
        given = torch.cuda.mem_get_info()[0]
    cache = batch * round(found.cache * context + found.sinks + found.window)
    plain = batch * round(found.plain * context + found.window)
    document = {
        "checkpoint": name, "context": context, "batch": batch, "weight_bytes": found.weights,
        "dense_weight_bytes": found.dense, "bytes_per_token": found.read, "cache_bytes": cache,
        "dense_cache_bytes": plain, "cache_bytes_per_token": found.cache,
        "cache_kernel": found.kernel, "reserve": RESERVE, "memory": given,
        "positions": found.positions,
    }  # fmt: skip
    rows = {
        "weights": f"{size(found.weights)} on the GPU, dense {size(found.dense)}",
        "read per token": f"{size(found.read)} of weights, {size(round(found.cache * context))} of cache",
        "KV cache": f"{size(cache)} for {batch} × {context} tokens, in 16 bits {size(plain)}",
        "in all": f"{size(found.weights + cache)}, dense {size(found.dense + plain)}",
    }
    if opened.kv_cache:
        reader = (
            "attention reads it as it lies" if found.kernel else "unpacked at every step: no kernel"
        )
        rows["format"] = f"{opened.kv_cache}; {reader}"
    if given is None:
        rows["longest context"] = "give --memory: there is no GPU here"
    else:
        longest, dense = (found.longest(given, batch, plain=plain) for plain in (False, True))
        document |= {"longest_context": longest, "dense_longest_context": dense}
        rows["longest context"] = f"{longest} tokens in {size(given)}, dense {dense}"
        if found.positions and longest > found.positions:
            rows["longest context"] += f"; the model was built for {found.positions}"
    console.result(document, facts(name, rows))
