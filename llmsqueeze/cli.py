"""The command line: options → one library call → one result. Heavy imports wait for their command."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llmsqueeze import __version__
from llmsqueeze.bench_command import bench
from llmsqueeze.command import (
    CHECKPOINT_HELP,
    EXIT_INTERRUPTED,
    activation_document,
    check_free,
    checkpoint_options,
    common,
    kv_document,
    make_console,
    open_checkpoint,
    site_documents,
)
from llmsqueeze.completion_command import PROGRAM, completion
from llmsqueeze.compress_command import compress
from llmsqueeze.doctor_command import doctor
from llmsqueeze.encode_recipe import ENCODES, EncodeRecipe
from llmsqueeze.errors import RecipeError
from llmsqueeze.eval_command import evaluate
from llmsqueeze.interrupt import end
from llmsqueeze.plan_command import plan
from llmsqueeze.prune_command import prune
from llmsqueeze.push_command import push
from llmsqueeze.quantize_kv_command import quantize_kv
from llmsqueeze.recipe_command import recipe
from llmsqueeze.recipe_keys import suggest
from llmsqueeze.report_command import report
from llmsqueeze.run_command import run
from llmsqueeze.sparsify_command import sparsify

if TYPE_CHECKING:
    from llmsqueeze.activation import ActivationRecord
    from llmsqueeze.console import Console


def main() -> NoReturn:
    """Entry point. Exit codes: see README; 1 is left to failed gates."""
    signal.signal(signal.SIGTERM, end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be no UTF-8. What stands for such bytes then is what JSON has for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    json_wanted = "--json" in sys.argv or os.environ.get("LLMSQUEEZE_JSON", "0") not in ("", "0")
    try:
        cli.main(prog_name=PROGRAM, standalone_mode=False)
        code = 0
    except click.ClickException as error:
        make_console(json=json_wanted).error(_message(error), 2)
        code = 2
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.Abort:
        code = EXIT_INTERRUPTED
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmsqueeze")
def cli() -> None:
    """Make language models smaller, and measure what it cost.

    prune a checkpoint, sparsify its activations, quantize-kv its cache, or compress it by a recipe for all
    three; eval what it lost, run it, bench how fast it is, report all that, inspect what is inside, convert
    between forms, push it to the hub; plan says what fits a GPU and what a recipe will do, recipe shows and
    checks one, doctor looks at this machine, completion teaches the shell all this.
    """


cli.add_command(prune)
cli.add_command(sparsify)
cli.add_command(quantize_kv)
cli.add_command(compress)
cli.add_command(recipe)
cli.add_command(evaluate)
cli.add_command(run)
cli.add_command(bench)
cli.add_command(report)
cli.add_command(push)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(completion)


@cli.command(
    help=f"Show what is inside CHECKPOINT: sites, sizes, how it was made.\n\n{CHECKPOINT_HELP}"
)
@click.argument("checkpoint")
@click.option("--verify", is_flag=True, help="Hash every shard and compare with the manifest.")
@checkpoint_options
@common
def inspect(
    console: Console, checkpoint: str, verify: bool, offline: bool, cache_dir: Path
) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmsqueeze import artifact
    from llmsqueeze.console import facts, shown, size
    from llmsqueeze.errors import CheckpointError
    from llmsqueeze.report.text import step_line

    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    manifest = opened.manifest
    if verify:
        if manifest is None:
            raise CheckpointError(
                f"{name} has no {artifact.MANIFEST_NAME}, so nothing to verify against"
            )
        damaged = artifact.verify(opened.path, manifest)
        if damaged:
            raise CheckpointError(f"{opened.path / damaged[0]}: contents differ from the manifest")
    document: dict[str, Any] = {
        "checkpoint": name,
        "model_type": opened.config["model_type"],
        "blocks": opened.block_count,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "bytes": {"after": opened.stored_bytes},
        "format": manifest.format if manifest else "plain",
        "verified": verify,
    }
    rows = {
        "architecture": f"{opened.config['model_type']}, {opened.block_count} blocks, {document['dtype']}",
        "format": document["format"],
        "size": size(opened.stored_bytes),
    }
    table = Table("site", "shape", "sparsity", "encoding", "before", "after", title_justify="left")
    if manifest:
        document["bytes"]["before"] = manifest.bytes_before
        document |= {"sites": site_documents(manifest), "steps": manifest.steps}
        rows["size"] = f"{size(manifest.bytes_before)} → {size(manifest.bytes_after)}"
        for step in manifest.steps:
            rows[step["command"]] = step_line(step)
        if manifest.activation:
            document["activation"] = activation_document(manifest.activation)
            rows["gates"] = _gates(manifest.activation)
        if manifest.kv_cache:
            document["kv_cache"] = kv_document(manifest.kv_cache)
            rows["kv cache"] = f"{manifest.kv_cache}, {len(manifest.kv_cache.layers)} layers"
        for site, record in manifest.sites.items():
            table.add_row(
                Text(shown(site)),
                f"{record.shape[0]} × {record.shape[1]}",
                f"{record.sparsity:.1%}",
                record.encoding,
                size(record.bytes_before),
                size(record.bytes_after),
            )
    if verify:
        rows["verified"] = "every shard matches the manifest"
    console.result(document, *([table] if manifest and manifest.sites else []), facts(name, rows))


@cli.command(
    help=f"""Rewrite CHECKPOINT without changing a bit of any weight, unless --encode says so.

To dense: zeros in place, loads in every tool, same size and same speed as the original.
To llmsqueeze: every linear in the smallest encoding that gives it back: a bitmask and packed non-zeros, or
bytes and scales.

{CHECKPOINT_HELP}
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--to", "format", type=click.Choice(["dense", "llmsqueeze"]), required=True)
@click.option("--encode", type=click.Choice(ENCODES),
              help="Round the weights of all linears to nearest, with one scale for each output: half the "
              "bytes.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@checkpoint_options
@common
def convert(
    console: Console,
    checkpoint: str,
    out: Path,
    format: str,
    encode: str | None,
    overwrite: bool,
    offline: bool,
    cache_dir: Path,
) -> None:
    from llmsqueeze import compress as library
    from llmsqueeze.console import facts, size

    if encode and format == "dense":
        raise RecipeError("--encode needs --to llmsqueeze: the dense form has no place for codes")
    check_free(out, overwrite)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    with console.steps() as progress:

        def on_block(done: library.BlockDone) -> None:
            progress("converting block", done.index + 1, done.total, f"{done.seconds:.1f} s")

        common: dict[str, Any] = {
            "overwrite": overwrite,
            "note": console.note,
            "on_block": on_block,
        }
        if encode:
            from llmsqueeze.encoded import encode as encode_checkpoint

            manifest = encode_checkpoint(opened, name, out, EncodeRecipe(encode), **common)
        else:
            manifest = library.convert(opened, name, out, format, **common)
    document = {
        "out": str(out),
        "format": format,
        "bytes": {"before": manifest.bytes_before, "after": manifest.bytes_after},
        "sites": site_documents(manifest),
    }
    rows = {
        "format": format + (": same size, same speed as the original" if format == "dense" else ""),
        "size": f"{size(manifest.bytes_before)} → {size(manifest.bytes_after)}",
    }
    if encode:
        error = manifest.steps[-1]["rounding_error"]
        document["rounding_error"] = error
        rows["rounding"] = f"{error:.2%} of a weight matrix on average"
        rows["next"] = f"llmsqueeze eval {out} --against {checkpoint}"
    console.result(document, facts(str(out), rows))


def _message(error: click.ClickException) -> str:
    """With the choice that a wrong one looks like; click itself says so of commands and options only."""
    message = error.format_message()
    kind = getattr(getattr(error, "param", None), "type", None)
    given = re.match(r"'(.*?)' is not one of", error.message)
    if not isinstance(kind, click.Choice) or not given:
        return message
    return message.rstrip(".") + suggest(given[1], [str(choice) for choice in kind.choices])


def _gates(record: ActivationRecord) -> str:
    """One line on the gates of sparsified activations."""
    shares = [gate.sparsity for gate in record.gates.values()]
    ranks = sum(gate.rank > 0 for gate in record.gates.values())
    line = f"{len(shares)}, dropping {min(shares):.0%} to {max(shares):.0%} of their inputs"
    return f"{line}, {ranks} with a low-rank branch" if ranks else line


if __name__ == "__main__":
    main()
