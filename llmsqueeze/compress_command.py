"""`llmsqueeze compress`: prune, encode, sparsify and quantize-kv by one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmsqueeze.command import (
    CHECKPOINT_HELP,
    RESUME_HELP,
    check_free,
    checkpoint_options,
    common,
    device_option,
    open_checkpoint,
    resume_option,
    working,
)
from llmsqueeze.recipe import read_recipe

if TYPE_CHECKING:
    from llmsqueeze.console import Console


@click.command(
    help=f"""Prune, encode, sparsify and quantize-kv CHECKPOINT by one recipe, into one checkpoint.

{CHECKPOINT_HELP}

The recipe is YAML: steps (prune, encode, sparsify, quantize-kv) and their settings, those of each command's
own --recipe; a step without settings takes the defaults. encode rounds linears to int8. A llmsqueeze.json is
a recipe, too: it says how its checkpoint was made. Steps are done in that order, and the result is what the
commands would give one after another.

{RESUME_HELP} Training masks goes on from its last saved step; a walk that only writes (encode alone)
starts anew.
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--recipe", "recipe_file", required=True, type=click.Path(path_type=Path),
              help="YAML with the steps, or the llmsqueeze.json of a checkpoint.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@resume_option
@device_option
@checkpoint_options
@common
def compress(
    console: Console, checkpoint: str, out: Path, recipe_file: Path, overwrite: bool, resume: str,
    device: str, offline: bool, cache_dir: Path,
) -> None:  # fmt: skip
    raw = read_recipe(recipe_file)

    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import facts, size
    from llmsqueeze.device import choose_device
    from llmsqueeze.steps import parse_steps, run_steps
    from llmsqueeze.traffic import bytes_per_token

    steps = parse_steps(raw)
    check_free(out, overwrite)
    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    with console.steps() as progress, working(console, out, where, resume) as work:
        seconds = run_steps(
            opened, name, out, steps, where, overwrite=overwrite, work=work,
            note=console.note,
            on_block=lambda command, b: progress(
                f"{command} block", b.index + 1, b.total, f"{b.seconds:.1f} s"
            ),
        )  # fmt: skip
    made = Checkpoint(out)
    before, after = bytes_per_token(opened), bytes_per_token(made)
    document = {
        "out": str(out),
        "walks": [{"commands": list(c), "seconds": s} for c, s in seconds.items()],
        "bytes": {"before": opened.stored_bytes, "after": made.stored_bytes},
        "bytes_per_token": {"before": before, "after": after},
        "kv_cache": str(made.kv_cache) if made.kv_cache else None,
    }
    rows = {
        "steps": ", ".join(f"{' + '.join(c)} {s:.1f} s" for c, s in seconds.items()),
        "size": f"{size(opened.stored_bytes)} → {size(made.stored_bytes)}",
        "read per token": f"{size(before)} → {size(after)} ({after / before:.0%})",
    }
    if made.kv_cache:
        rows["kv cache"] = str(made.kv_cache)
    rows["next"] = f"llmsqueeze eval {out} --against {checkpoint}"
    console.result(document, facts(str(out), rows))
