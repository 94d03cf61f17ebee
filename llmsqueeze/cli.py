"""The command line: options → one library call → one result. Heavy imports wait for their command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llmsqueeze import __version__
from llmsqueeze.command import (
    CHECKPOINT_HELP,
    EXIT_INTERRUPTED,
    checkpoint_options,
    common,
    device_option,
    make_console,
    open_checkpoint,
    site_documents,
)
from llmsqueeze.errors import RecipeError
from llmsqueeze.prune_command import prune
from llmsqueeze.recipe import DTYPES

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console

EXIT_TERMINATED = 143


def main() -> NoReturn:
    """Entry point. Exit codes: see README; 1 is left to failed gates."""
    signal.signal(signal.SIGTERM, _terminate)
    json_wanted = "--json" in sys.argv or os.environ.get("LLMSQUEEZE_JSON", "0") not in ("", "0")
    try:
        cli.main(standalone_mode=False)
        code = 0
    except click.ClickException as error:
        make_console(json=json_wanted).error(error.format_message(), 2)
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

    prune a checkpoint, eval what it lost, inspect what is inside, convert between forms.
    """


cli.add_command(prune)


@cli.command(
    "eval",
    help=f"""Measure the perplexity of CHECKPOINT, and of the dense model beside it.

{CHECKPOINT_HELP}

token_ppl: the text is tokenised once and cut into windows; the exponential of the mean
cross-entropy over seqlen-1 predictions per window. Not comparable with word perplexity.
""",
)
@click.argument("checkpoint")
@click.option("--against", metavar="DENSE", help="Also measure this one, with the same settings.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 text file.  [default: bundled]"
)
@click.option(
    "--seqlen", type=int, help="Tokens per window.  [default: 2048, or what the model has]"
)
@click.option("--windows", type=int, help="Only the first so many windows.  [default: all]")
@click.option("--bos", is_flag=True, help="Start the text with the beginning-of-text token.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="Precision; auto: the checkpoint's on a GPU, float32 on a CPU.")  # fmt: skip
@device_option
@checkpoint_options
@common
def evaluate(
    console: Console,
    checkpoint: str,
    against: str | None,
    text: Path | None,
    seqlen: int | None,
    windows: int | None,
    bos: bool,
    dtype: str,
    device: str,
    offline: bool,
    cache_dir: Path,
) -> None:
    if windows is not None and windows < 1:
        raise RecipeError(f"--windows {windows}: at least one window is needed")
    if seqlen is not None and seqlen < 2:
        raise RecipeError(f"--seqlen {seqlen}: a window needs at least two tokens")

    import torch

    from llmsqueeze.console import facts
    from llmsqueeze.data import Windows, evaluation_windows, load_tokenizer
    from llmsqueeze.device import choose_device, evaluation_dtype
    from llmsqueeze.evaluate import Perplexity, perplexity
    from llmsqueeze.plan import check_vocabulary, window_length
    from llmsqueeze.runtime import load

    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    other = open_checkpoint(console, against, offline, cache_dir) if against else None
    if other and other[0].config.get("vocab_size") != opened.config.get("vocab_size"):
        raise RecipeError(f"{against} and {checkpoint} have different vocabularies")
    precision = evaluation_dtype(dtype, opened.dtype, where)
    length = window_length(opened, seqlen)

    def cut(source: Checkpoint) -> Windows:
        tokenizer = load_tokenizer(source.path)
        made = evaluation_windows(text, tokenizer, seqlen=length, windows=windows, bos=bos)
        check_vocabulary(made.tokens, source)
        return made

    def measure(source: Checkpoint, label: str) -> Perplexity:
        model = load(source, precision, where)
        with console.steps() as progress:
            return perplexity(
                model, cutting.tokens, lambda d, t: progress(f"{label} window", d, t, "")
            )

    cutting = cut(opened)
    if other and not torch.equal(cut(other[0]).tokens, cutting.tokens):
        raise RecipeError(f"{against} and {checkpoint} tokenise the text differently")
    mine = measure(opened, "eval")
    document: dict[str, Any] = {
        "checkpoint": name,
        "token_ppl": mine.token_ppl,
        "seqlen": mine.seqlen,
        "windows": mine.windows,
        "tokens": mine.tokens,
        "bos": bos,
        "dtype": str(precision).removeprefix("torch."),
        "device": str(where),
        "text": cutting.source,
        "text_sha256": cutting.text_sha256,
        "seconds": mine.seconds,
    }
    rows = {f"token_ppl@{mine.seqlen}": f"{mine.token_ppl:.3f}"}
    if other:
        dense = measure(other[0], "dense")
        ratio = mine.token_ppl / dense.token_ppl
        document |= {"against": other[1], "dense_token_ppl": dense.token_ppl, "ratio": ratio}
        rows |= {"dense": f"{dense.token_ppl:.3f}", "ratio": f"{ratio:.3f}"}
    rows |= {
        "text": f"{cutting.source}, {mine.windows} windows, {mine.tokens} predictions",
        "dtype": document["dtype"],
    }
    console.result(document, facts(name, rows))


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

    from llmsqueeze import artifact
    from llmsqueeze.console import facts, size
    from llmsqueeze.errors import CheckpointError

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
            rows[step["command"]] = (
                f"{step['recipe']['method']} {step['recipe']['target']['pattern']}, "
                f"{step['sparsity']:.2%} of {step['source']['name']}"
            )
        for site, record in manifest.sites.items():
            table.add_row(
                site,
                f"{record.shape[0]} × {record.shape[1]}",
                f"{record.sparsity:.1%}",
                record.encoding,
                size(record.bytes_before),
                size(record.bytes_after),
            )
    if verify:
        rows["verified"] = "every shard matches the manifest"
    console.result(document, *([table] if manifest else []), facts(name, rows))


@cli.command(
    help=f"""Rewrite CHECKPOINT without changing a bit of any weight.

To dense: zeros in place, loads in every tool, same size and same speed as the original.
To llmsqueeze: bitmask and packed non-zeros, smaller on disk.

{CHECKPOINT_HELP}
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--to", "format", type=click.Choice(["dense", "llmsqueeze"]), required=True)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@checkpoint_options
@common
def convert(
    console: Console,
    checkpoint: str,
    out: Path,
    format: str,
    overwrite: bool,
    offline: bool,
    cache_dir: Path,
) -> None:
    from llmsqueeze import compress
    from llmsqueeze.artifact import check_output
    from llmsqueeze.console import facts, size

    check_output(out, overwrite)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    with console.steps() as progress:
        manifest = compress.convert(
            opened, name, out, format, overwrite=overwrite,
            on_block=lambda b: progress("converting block", b.index + 1, b.total, f"{b.seconds:.1f} s"),
        )  # fmt: skip
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
    console.result(document, facts(str(out), rows))


def _terminate(number: int, frame: FrameType | None) -> None:
    # Unwinds like an error, so that the half-written directory is removed.
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    main()
