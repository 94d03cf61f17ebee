"""`llmsqueeze sparsify`: options and recipe file → one SparsifyRecipe → one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    CALIBRATION,
    CHECKPOINT_HELP,
    RESUME_HELP,
    activation_document,
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
    took,
    working,
)
from llmsqueeze.encode_recipe import ENCODES, EncodeRecipe
from llmsqueeze.errors import RecipeError
from llmsqueeze.launch import share
from llmsqueeze.methods import ACTIVATION_METHODS
from llmsqueeze.recipe import config_fields
from llmsqueeze.recipe_file import read_recipe
from llmsqueeze.sparsify_recipe import (
    ALLOCATIONS,
    DEFAULT_ACTIVATION_METHOD,
    DEFAULT_SAMPLES,
    DEFAULT_SEQLEN,
    SparsifyRecipe,
)

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console

TOP = ("method", "sparsity", "allocation", "greedy_step", "prefill", "prefix", "sequential",
       "rotate", "ignore", "dtype")  # fmt: skip

_SUMMARIES = "\n".join(f"  {name:<9}{entry.summary}" for name, entry in ACTIVATION_METHODS.items())


@click.command(
    help=f"""Calibrate which inputs the linears of CHECKPOINT may skip, and write it with thresholds to OUT.

{CHECKPOINT_HELP} Prune first: thresholds are calibrated on the weights as they are.

\b
Methods:
{_SUMMARIES}

Without --method: teal, which with greedy allocation lost least at equal bytes in README.

Weights stay as they are. Decoding then reads only the weights of inputs whose magnitude exceeds the
threshold of their channel; which tokens of a prompt are gated as well is --prefill. A checkpoint that
has thresholds already gets others from its stored quantiles, without calibration, when no --method is
named.

{RESUME_HELP} Reading other thresholds off stored quantiles keeps no state.
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE",
              help="YAML with any part of a recipe, as llmsqueeze.json records it; options given "
              "here win.")  # fmt: skip
@click.option("--method", type=click.Choice(list(ACTIVATION_METHODS)),
              help=f"Which inputs count least.  [default: {DEFAULT_ACTIVATION_METHOD}]")  # fmt: skip
@click.option("--sparsity", type=float, help="Share of inputs to drop, 0 to 0.95.  [default: 0.5]")
@click.option("--allocation", type=click.Choice(ALLOCATIONS),
              help="uniform: the same share everywhere; greedy: half of it everywhere, the rest where it "
              "costs the block's output least, --sparsity of its bytes.  "
              "[default: greedy; rsparse: uniform]")  # fmt: skip
@click.option("--greedy-step", type=float,
              help="[greedy] Share of the bytes that one step gives away.  [default: 0.025]")  # fmt: skip
@click.option("--prefill", metavar="POLICY",
              help="Prompt tokens that are gated when the checkpoint runs: dense (none), tail:SHARE, "
              "after:TOKENS or all.  [default: dense]")  # fmt: skip
@click.option("--prefix", type=int,
              help="First tokens of every calibration window that do not count: attention sinks."
              "  [default: 4]")  # fmt: skip
@click.option("--sequential/--no-sequential", default=None,
              help="Calibrate every gate on what comes through the gates before it, or on the dense "
              "model.  [default: sequential]")  # fmt: skip
@click.option("--rotate", is_flag=True, default=None,
              help="Experiment: first rotate the residual stream towards orthogonal columns, by one "
              "rotation folded into all weights. The function stays; the head is untied.")  # fmt: skip
@click.option("--encode", type=click.Choice(ENCODES),
              help="Round the weights of all linears first, to nearest, with one scale for each output; "
              "thresholds are calibrated on the rounded ones.")  # fmt: skip
@click.option("--ignore", multiple=True, metavar="NAME",
              help="Linear that reads everything: full name, last part (v_proj), or re:REGEX. "
              "Repeatable.")  # fmt: skip
@config_options(ACTIVATION_METHODS)
@calibration_options(DEFAULT_SAMPLES, str(DEFAULT_SEQLEN))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@resume_option
@device_option
@gpus_option
@checkpoint_options
@shared
def sparsify(
    console: Console,
    checkpoint: str,
    out: Path,
    recipe_file: Path | None,
    encode: str | None,
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

    from llmsqueeze import sparsify as library
    from llmsqueeze.allocator import return_freed
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import size
    from llmsqueeze.ranks import joined, own_device

    return_freed()
    where = own_device(device, world, gpus)
    with joined(world, where) as team:
        team.lead(lambda: check_free(out, overwrite))
        opened, name = team.first(lambda: open_checkpoint(console, checkpoint, offline, cache_dir))
        read_off = opened.activation and not raw and not encode
        if read_off and set(given) <= {"sparsity", "prefill"}:
            console.note(
                "thresholds come from the stored quantiles; name --method to calibrate again"
            )

            def change() -> None:
                library.change_sparsity(
                    opened, name, out, recipe.sparsity, given.get("prefill"), overwrite=overwrite
                )

            team.lead(change)  # nothing to share
            _report(console, opened, Checkpoint(out), checkpoint, {}, {})
            return
        with console.steps() as progress, working(console, out, where, resume, team) as work:
            report = library.sparsify(
                opened, name, out, recipe, where, overwrite=overwrite, work=work, note=console.note,
                encode=EncodeRecipe(encode) if encode else None,
                on_block=lambda b: progress(
                    "calibrating block", b.index + 1, b.total, f"{b.seconds:.1f} s"
                ),
            )  # fmt: skip
    document = {
        "already_sparse": report.already_sparse,
        "resumed_blocks": report.resumed,
        "ranks": world.size,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_device_bytes": report.peak_device_bytes,
    }
    rows = {
        "time": took(report),
        "peak memory": size(report.peak_rss_bytes)
        + " host"
        + (f", {size(report.peak_device_bytes)} device" if report.peak_device_bytes else ""),
    }
    if encode:
        error = next(s for s in report.manifest.steps[::-1] if s["command"] == "encode")[
            "rounding_error"
        ]
        document["rounding_error"] = error
        rows["weights"] = f"{encode}, {error:.2%} off on average"
    _report(console, opened, Checkpoint(out), checkpoint, document, rows)


def _report(
    console: Console,
    source: Checkpoint,
    made: Checkpoint,
    spec: str,
    document: dict[str, Any],
    rows: dict[str, str],
) -> None:
    from llmsqueeze.console import facts, size
    from llmsqueeze.traffic import bytes_per_token

    record = made.activation
    assert record is not None
    before, after = bytes_per_token(source), bytes_per_token(made)
    mean = sum(gate.sparsity for gate in record.gates.values()) / len(record.gates)
    document = {
        "out": str(made.path),
        **activation_document(record),
        "sparsity": mean,
        "bytes_per_token": {"before": before, "after": after},
        **document,
    }
    facts_ = {
        "method": f"{record.method}, {len(record.gates)} gates, {mean:.1%} dropped on average",
        "prompt tokens": f"gated: {record.prefill}",
        "read per token": f"{size(before)} → {size(after)} ({after / before:.0%})",
        **rows,
        "next": f"llmsqueeze eval {made.path} --against {spec}",
    }
    console.result(document, facts(str(made.path), facts_))


def build_recipe(raw: dict[str, Any], given: dict[str, Any]) -> SparsifyRecipe:
    """The recipe of a file, `raw`, with the options that were given put over it."""
    given = dict(given)
    raw = {**raw, **{name: given.pop(name) for name in TOP if name in given}}
    if "batch_size" in given:
        raw["batch"] = given.pop("batch_size")
    found = {key: given.pop(name) for name, key in CALIBRATION.items() if name in given}
    if found:
        raw["calibration"] = {**(raw.get("calibration") or {}), **found}
    method = raw.get("method") or DEFAULT_ACTIVATION_METHOD
    for name, value in given.items():
        if name not in config_fields(ACTIVATION_METHODS, method):
            owners = [m for m in ACTIVATION_METHODS if name in config_fields(ACTIVATION_METHODS, m)]
            flag = "--" + name.replace("_", "-")
            raise RecipeError(
                f"{flag} belongs to {', '.join(owners)}, which this recipe does not use"
            )
        raw["config"] = {**(raw.get("config") or {}), name: value}
    return SparsifyRecipe.from_dict(raw)
