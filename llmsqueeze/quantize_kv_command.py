"""`llmsqueeze quantize-kv`: options and recipe file → one KvRecipe → one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    CALIBRATION,
    CHECKPOINT_HELP,
    RESUME_HELP,
    calibration_options,
    check_free,
    checkpoint_options,
    config_options,
    device_option,
    gpus_option,
    kv_document,
    libraries,
    open_checkpoint,
    resume_option,
    shared,
    took,
    working,
)
from llmsqueeze.errors import RecipeError
from llmsqueeze.kv_recipe import (
    DEFAULT_BITS,
    DEFAULT_KV_METHOD,
    DEFAULT_SAMPLES,
    DEFAULT_SEQLEN,
    KvRecipe,
)
from llmsqueeze.launch import share
from llmsqueeze.methods import KV_METHODS
from llmsqueeze.recipe import config_fields
from llmsqueeze.recipe_file import read_recipe

if TYPE_CHECKING:
    from llmsqueeze.console import Console

TOP = ("method", "bits", "outliers", "sinks", "dtype")
# What only a calibrated method uses.
CALIBRATED_ONLY = ("sinks", "dtype", "batch_size", *CALIBRATION)

_SUMMARIES = "\n".join(f"  {name:<9}{entry.summary}" for name, entry in KV_METHODS.items())


@click.command(
    name="quantize-kv",
    help=f"""Calibrate how the KV cache of CHECKPOINT is quantised, and write it with that to OUT.

{CHECKPOINT_HELP} Prune first: codebooks are calibrated on the weights as they are.

\b
Methods:
{_SUMMARIES}

Weights stay as they are. `eval` then measures the checkpoint with its cache packed, and
`llmsqueeze.kv_cache(model)` makes such a cache for transformers.

{RESUME_HELP} The gradients of --fisher are kept when they are complete.
With --gpus N it ends after every N blocks.
""",
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE",
              help="YAML with any part of a recipe, as llmsqueeze.json records it; options given "
              "here win.")  # fmt: skip
@click.option("--method", type=click.Choice(list(KV_METHODS)),
              help=f"How entries are coded.  [default: {DEFAULT_KV_METHOD}]")  # fmt: skip
@click.option(
    "--bits", type=int, help=f"Of a code: 4, 3 or 2; fp8 has 8.  [default: {DEFAULT_BITS}]"
)
@click.option("--outliers", type=float,
              help="[kvquant] Share of the entries of every token and head that are kept exactly, rounded to "
              "whole entries, at least one.  [default: 0]")  # fmt: skip
@click.option("--sinks", type=int,
              help="[kvquant] First positions that are kept in 16 bits.  [default: 1]")  # fmt: skip
@config_options(KV_METHODS)
@calibration_options(DEFAULT_SAMPLES, str(DEFAULT_SEQLEN))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@resume_option
@device_option
@gpus_option
@checkpoint_options
@shared
def quantize_kv(
    console: Console,
    checkpoint: str,
    out: Path,
    recipe_file: Path | None,
    overwrite: bool,
    resume: str,
    device: str,
    gpus: int | None,
    offline: bool,
    cache_dir: Path,
    **options: Any,
) -> None:
    raw = read_recipe(recipe_file) if recipe_file else {}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    recipe = build_recipe(raw, given)
    world = share(console, gpus)
    libraries(console.verbose)

    from llmsqueeze import quantize_kv as library
    from llmsqueeze.allocator import return_freed
    from llmsqueeze.console import facts, size
    from llmsqueeze.ranks import joined, own_device
    from llmsqueeze.runtime.kv_cache import stored_formats

    return_freed()
    where = own_device(device, world, gpus)
    with joined(world, where) as team:
        team.lead(lambda: check_free(out, overwrite))
        opened, name = team.first(lambda: open_checkpoint(console, checkpoint, offline, cache_dir))
        with console.steps() as progress, working(console, out, where, resume, team) as work:
            report = library.quantize_kv(
                opened, name, out, recipe, where, overwrite=overwrite, work=work, note=console.note,
                on_block=lambda b: progress(
                    "calibrating block", b.index + 1, b.total, f"{b.seconds:.1f} s"
                ),
                on_gradient=lambda done, total: progress("gradient of sample", done, total, ""),
            )  # fmt: skip
    from llmsqueeze.checkpoint import Checkpoint

    made, record = Checkpoint(out), report.record
    formats = stored_formats(record, made.read_kv_cache())
    bits = formats[record.layers[0]].bits_per_element(record.heads, record.width)
    document = {
        "out": str(out),
        **kv_document(record),
        "bits_per_element": bits,
        "side_bytes": record.file.bytes if record.file else 0,
        "resumed_blocks": report.resumed,
        "ranks": world.size,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_device_bytes": report.peak_device_bytes,
    }
    rows = {
        "method": f"{record}, {len(record.layers)} of {opened.block_count} layers",
        "kv cache": f"{bits:.2f} bits per element"
        + (f", first {record.sinks} positions in 16" if record.sinks else ""),
        "calibration": size(document["side_bytes"]) if record.file else "none",
        "time": took(report),
        "peak memory": size(report.peak_rss_bytes)
        + " host"
        + (f", {size(report.peak_device_bytes)} device" if report.peak_device_bytes else ""),
        "next": f"llmsqueeze eval {out} --against {checkpoint} --passkey",
    }
    console.result(document, facts(str(out), rows))


def build_recipe(raw: dict[str, Any], given: dict[str, Any]) -> KvRecipe:
    """The recipe of a file, `raw`, with the options that were given put over it."""
    given = dict(given)
    method = given.get("method") or raw.get("method") or DEFAULT_KV_METHOD
    settings = config_fields(KV_METHODS, method)
    for name in given:
        calibrated = name in CALIBRATED_ONLY or any(
            name in config_fields(KV_METHODS, other) for other in KV_METHODS
        )
        if calibrated and not settings:
            flag = "--" + name.replace("_", "-")
            raise RecipeError(f"{flag} belongs to kvquant; {method} needs no calibration")
    raw = {**raw, **{name: given.pop(name) for name in TOP if name in given}}
    if "batch_size" in given:
        raw["batch"] = given.pop("batch_size")
    found = {key: given.pop(name) for name, key in CALIBRATION.items() if name in given}
    if found:
        raw["calibration"] = {**(raw.get("calibration") or {}), **found}
    if given:
        raw["config"] = {**(raw.get("config") or {}), **given}
    return KvRecipe.from_dict(raw)
