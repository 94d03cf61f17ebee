"""`llmsqueeze plan`: what a checkpoint will take of a GPU, before it is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from click.core import ParameterSource

from llmsqueeze.command import (
    CHECKPOINT_HELP,
    checkpoint_options,
    common,
    device_option,
    open_checkpoint,
)
from llmsqueeze.conditions import parse_size
from llmsqueeze.console import Console
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe_options import Asked, ask, recipe_options


@click.command(
    help=f"""Say what CHECKPOINT takes of a GPU while it decodes, or what a recipe will make of it.

{CHECKPOINT_HELP}

Reads headers, not weights. The cache is exact; weights with zeros are estimated, to about a tenth.
Without --memory the GPU here is asked what it has free.

With --preset, --recipe or --set it is a dry run of compress: what changes, bytes before and after, memory,
time and kernels. Time is from a count of multiplications and the rate of one matrix product that is measured
for a moment, on the device that compress would take.
"""
)
@click.argument("checkpoint")
@click.option("--context", type=int, default=8192, show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once.")
@click.option("--memory", metavar="SIZE", help="Of the GPU, as in 24GB.")
@recipe_options
@device_option
@checkpoint_options
@common
def plan(
    console: Console, checkpoint: str, context: int, batch: int, memory: str | None, preset: str | None,
    recipe: Path | None, settings: tuple[str, ...], device: str, offline: bool, cache_dir: Path,
) -> None:  # fmt: skip
    if min(context, batch) < 1:
        raise RecipeError(f"--context {context} --batch {batch}: both must be at least 1")
    given = None if memory is None else parse_size(memory)
    asked = ask(preset, recipe, settings)
    if asked:
        source = click.get_current_context().get_parameter_source
        given_too = [f"--{name}" for name in ("context", "batch", "memory")
                     if source(name) is ParameterSource.COMMANDLINE]  # fmt: skip
        if given_too:
            raise RecipeError(
                f"{' and '.join(given_too)}: not with a recipe; plan the checkpoint that it makes"
            )
        _dry_run(console, checkpoint, asked, device, offline, cache_dir)
        return

    import torch

    from llmsqueeze.capacity import RESERVE, capacity
    from llmsqueeze.console import facts, size

    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    found = capacity(opened)
    if given is None and torch.cuda.is_available():
        given = torch.cuda.mem_get_info()[0]
    cache = batch * round(found.cache * context + found.sinks + found.window)
    plain = batch * round(found.plain * context + found.plain_window)
    document = {
        "checkpoint": name, "context": context, "batch": batch, "weight_bytes": found.weights,
        "dense_weight_bytes": found.dense, "bytes_per_token": found.read, "cache_bytes": cache,
        "dense_cache_bytes": plain, "cache_bytes_per_token": found.cache,
        "cache_kernel": found.kernel, "reserve": RESERVE, "memory": given,
        "positions": found.positions,
    }  # fmt: skip
    rows = {
        "weights": f"{size(found.weights)} on the GPU, dense {size(found.dense)}",
        "read per token": f"{size(found.read)} of weights, "
        f"{size(round(found.cache * context + found.window))} of cache",
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


def _dry_run(
    console: Console, checkpoint: str, asked: Asked, device: str, offline: bool, cache_dir: Path
) -> None:
    """plan --recipe: what compress would do."""
    from llmsqueeze.compress import rss_bytes
    from llmsqueeze.console import facts, size
    from llmsqueeze.device import choose_device
    from llmsqueeze.forecast import efforts, host_bytes, outcome

    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    now = rss_bytes()  # before products are measured, which leave memory behind
    made = outcome(opened, asked.steps)
    took = efforts(opened, asked.steps, where)
    most = max(effort.bytes for effort in took)
    seconds = [effort.seconds for effort in took]
    total = None if None in seconds else sum(s for s in seconds if s)
    on_gpu = where.type == "cuda"
    host = host_bytes(opened, asked.steps, made, took, where, now)
    document = {
        "checkpoint": name, "device": str(where), "blocks": made.blocks, "linears": made.linears,
        "sites": made.sites,
        "bytes": {"before": made.bytes_before, "after": made.bytes_after},
        "bytes_per_token": {"before": made.read_before, "after": made.read_after},
        "peak_rss_bytes": host, "peak_device_bytes": most if on_gpu else None, "seconds": total,
        "steps": [dataclasses.asdict(effort) for effort in took], "kernels": made.kernels,
    }  # fmt: skip
    left = made.read_after / made.read_before
    time = "not estimated: masks are trained"
    if total is not None:
        time = f"about {duration(total)} on {where}"
    rows = {
        "model": f"{made.blocks} blocks, {made.linears} linears",
        "steps": ", ".join(
            effort.command
            + (f" ({made.sites[effort.command]} linears)" if effort.command in made.sites else "")
            for effort in took
        ),
        "size": f"{size(made.bytes_before)} → {size(made.bytes_after)}",
        "read per token": f"{size(made.read_before)} → {size(made.read_after)} ({left:.0%})",
        "peak memory": f"about {size(host)} host" + (f", {size(most)} on {where}" if on_gpu else ""),
        "time": time,
        "kernels": ", ".join(f"{kind} ({count})" for kind, count in made.kernels.items()),
        "gain": gain(made.kernels, left),
    }  # fmt: skip
    console.result(document, facts(name, rows))


def duration(seconds: float) -> str:
    """For people, no more exact than an estimate is."""
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def gain(kernels: dict[str, int], left: float) -> str:
    """Whether decoding will be faster, as far as bytes say."""
    dense = kernels.get("dense", 0)
    if dense == sum(kernels.values()):
        return "none in decoding: these weights run dense"
    bound = f"at most {1 / left:.2f} times as fast decoding, by the bytes read"
    return bound + (f"; {dense} linears run dense" if dense else "")
