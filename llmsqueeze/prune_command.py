"""`llmsqueeze prune`: options and recipe file → one PruneRecipe → one call."""

from __future__ import annotations

import dataclasses
import shutil
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
    libraries,
    open_checkpoint,
    resume_option,
    shared,
    site_documents,
    took,
    working,
)
from llmsqueeze.launch import share
from llmsqueeze.methods import ALLOCATIONS, REFITS, TILE_MODES, WEIGHT_METHODS, Entry
from llmsqueeze.methods.base import DEFAULT_BUDGET
from llmsqueeze.recipe import (
    ORDERS,
    Calibration,
    PruneRecipe,
    place_options,
)
from llmsqueeze.recipe_file import read_recipe

if TYPE_CHECKING:
    from llmsqueeze.artifact import Manifest
    from llmsqueeze.console import Console

# Options that are keys of a recipe's sections, and their names there.
TOP = {
    name: name
    for name in (
        "method",
        "refit",
        "allocation",
        "tiles",
        "dense_share",
        "expert_tokens",
        "ignore",
        "dtype",
        "order",
    )
}
TOP["batch_size"] = "batch"
TARGET = {name: name for name in ("sparsity", "pattern", "tile", "channel_budget")}


def _summaries(table: dict[str, Entry]) -> str:
    return "\n".join(f"  {name:<11}{entry.summary}" for name, entry in table.items())


def _default(owner: type, field: str) -> str:
    """Help text for a default that is stated in a dataclass."""
    value = next(f.default for f in dataclasses.fields(owner) if f.name == field)
    return f"  [default: {value}]"


@click.command(
    help=f"""Prune the weights of CHECKPOINT and write a smaller checkpoint to OUT.

{CHECKPOINT_HELP}

\b
Methods:
{_summaries(WEIGHT_METHODS)}

\b
Refits (--refit), after any method:
{_summaries(REFITS)}

\b
Allocations (--allocation), how much goes where:
{_summaries(ALLOCATIONS)}

\b
Tiles (--tiles), for --pattern tile:
{_summaries(TILE_MODES)}

Without --method: admm and refit, which lose least at every pattern measured in README. A method that
is named runs as published, without refit unless --refit asks for it.

Embeddings and lm_head are never pruned. The model is read and written one block at a time.

{RESUME_HELP} Training masks keeps its own state (--training-state), the last step before a stop
or every --save-every steps.
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE",
              help="YAML with any part of a recipe, as llmsqueeze.json records it; options given "
              "here win.")  # fmt: skip
@click.option("--method", type=click.Choice(list(WEIGHT_METHODS)),
              help="How weights are chosen.  [default: admm with --refit pcg]")  # fmt: skip
@click.option("--refit", type=click.Choice(list(REFITS)), help="How what stays is solved again.")
@click.option("--allocation", type=click.Choice(list(ALLOCATIONS)),
              help="How much goes where.  [default: uniform]")  # fmt: skip
@click.option("--sparsity", type=float,
              help="Fraction to remove, in [0, 1).  [default: 0.5; tile: 0.35]")  # fmt: skip
@click.option("--pattern",
              help="unstructured; N:M, N kept of every M inputs; N:M-out, of every M outputs; tile, "
              "square tiles each dense or 2:4.  [default: unstructured]")  # fmt: skip
@click.option("--tile", type=int, help="[tile] Tile size.  [default: 128]")
@click.option("--tiles", type=click.Choice(list(TILE_MODES)),
              help="[tile] How the dense tiles are chosen.  [default: score]")  # fmt: skip
@click.option("--training-state", type=click.Path(path_type=Path), metavar="DIR",
              help="Where training masks saves its state, and goes on from it."
              "  [default: OUT.training, removed at the end]")  # fmt: skip
@click.option("--channel-budget", type=float,
              help="[N:M-out] Share of inputs kept whole, and dropped in exchange."
              f"  [default: {DEFAULT_BUDGET}]")  # fmt: skip
@click.option("--dense-share", type=float,
              help="How far admm and refit aim at what the dense model computes, 0 to 1; 0 follows "
              "the pruned model alone." + _default(PruneRecipe, "dense_share"))  # fmt: skip
@click.option("--expert-tokens", type=float,
              help="Linears of experts with fewer calibration tokens than this times their inputs are not "
              "fitted to them, but pruned by wanda, with nearly none by magnitude."
              + _default(PruneRecipe, "expert_tokens"))  # fmt: skip
@click.option("--ignore", multiple=True, metavar="NAME",
              help="Linear to leave dense: full name, last part (down_proj), or re:REGEX. "
              "Repeatable.")  # fmt: skip
@config_options(
    WEIGHT_METHODS,
    REFITS,
    ALLOCATIONS,
    {"tile": TILE_MODES["tile"]},
    without=("mode", "seed"),  # these follow from --tiles and --seed
)
@calibration_options(Calibration().samples, "2048, or what the model has")
@click.option("--order", type=click.Choice(ORDERS),
              help="group: measure q/k/v, compress, measure o, …: one pass. "
              "block: measure the whole uncompressed block: two passes, less memory."
              + _default(PruneRecipe, "order"))  # fmt: skip
@click.option("--activations", type=click.Choice(("device", "host", "disk")),
              default="device", show_default=True,
              help="Where calibration activations wait between blocks; disk: beside OUT. With --order block "
              "little else grows with --samples. The result has the same bytes.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@resume_option
@device_option
@gpus_option
@checkpoint_options
@shared
def prune(
    console: Console,
    checkpoint: str,
    out: Path,
    recipe_file: Path | None,
    training_state: Path | None,
    activations: str,
    overwrite: bool,
    resume: str,
    device: str,
    gpus: int | None,
    offline: bool,
    cache_dir: Path,
    **options: Any,
) -> None:
    recipe = build_recipe(read_recipe(recipe_file) if recipe_file else {}, options)
    world = share(console, gpus)
    libraries(console.verbose)

    from llmsqueeze import compress
    from llmsqueeze.allocator import return_freed
    from llmsqueeze.console import facts, size
    from llmsqueeze.expert_note import few_tokens
    from llmsqueeze.ranks import joined, own_device

    return_freed()
    where = own_device(device, world, gpus)
    state = training_state
    if state is None and recipe.tiles != "score":
        state = out.with_name(out.name + ".training")
    with joined(world, where) as team:
        team.lead(lambda: check_free(out, overwrite))
        opened, name = team.first(lambda: open_checkpoint(console, checkpoint, offline, cache_dir))
        with console.steps() as progress, working(console, out, where, resume, team) as work:
            report = compress.prune(
                opened, name, out, recipe, where, overwrite=overwrite, training_state=state,
                work=work, note=console.note, activations=activations,
                on_block=lambda b: progress(
                    "pruning block", b.index + 1, b.total, f"{b.seconds:.1f} s"
                ),
                on_step=lambda s: progress(
                    "training step", s.index + 1, s.total, f"loss {s.loss:.4f}, density {s.density:.3f}"
                ),
            )  # fmt: skip
    if state is not None and training_state is None:
        shutil.rmtree(state, ignore_errors=True)
    manifest = report.manifest
    document = {
        "out": str(out),
        "method": recipe.method,
        "refit": recipe.refit,
        "allocation": recipe.allocation,
        "tiles": recipe.tiles,
        "pattern": recipe.target.pattern_name,
        "sparsity": report.sparsity,
        "bytes": {"before": manifest.bytes_before, "after": manifest.bytes_after},
        "resumed_blocks": report.resumed,
        "ranks": world.size,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "sites": site_documents(manifest),
    }
    parts = [recipe.method, f"refit {recipe.refit}" if recipe.refit != "none" else ""]
    parts += [f"tiles {recipe.tiles}" if recipe.tiles != "score" else ""]
    parts += [f"allocation {recipe.allocation}" if recipe.allocation != "uniform" else ""]
    rows = {
        "method": ", ".join(part for part in [*parts, recipe.target.pattern_name] if part),
        "sparsity": f"{report.sparsity:.2%} of {len(manifest.sites)} linears",
        "size": f"{size(manifest.bytes_before)} → {size(manifest.bytes_after)} "
        f"({manifest.bytes_after / manifest.bytes_before:.0%})",
        "output error": _errors(manifest),
        "experts": few_tokens(manifest.sites) or "",
        "time": took(report),
        "peak memory": size(report.peak_rss_bytes) + " host"
        + (f", {size(report.peak_device_bytes)} device" if report.peak_device_bytes else ""),
        "next": f"llmsqueeze eval {out} --against {checkpoint}",
    }  # fmt: skip
    console.result(document, facts(str(out), {name: row for name, row in rows.items() if row}))


def build_recipe(raw: dict[str, Any], options: dict[str, Any]) -> PruneRecipe:
    """The recipe of a file, `raw`, with the options that were given put over it."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    raw = {**raw, **{key: given.pop(name) for name, key in TOP.items() if name in given}}
    for section, names in (("target", TARGET), ("calibration", CALIBRATION)):
        found = {key: given.pop(name) for name, key in names.items() if name in given}
        if found:
            raw[section] = {**(raw.get(section) or {}), **found}
    return PruneRecipe.from_dict(place_options(raw, given))


def _errors(manifest: Manifest) -> str:
    """Relative output error by kind of linear: mean over blocks, and the worst site."""
    kinds: dict[str, list[float]] = {}
    worst, where = 0.0, ""
    for name, record in manifest.sites.items():
        error = record.report.get("relative_error")
        if error is None:
            continue
        kinds.setdefault(name.rpartition(".")[2], []).append(error)
        if error >= worst:
            worst, where = error, name
    lines = [f"{kind} {sum(errors) / len(errors):.1%}" for kind, errors in kinds.items()]
    return ", ".join(lines) + f"; most in {where}: {worst:.1%}" if lines else ""
