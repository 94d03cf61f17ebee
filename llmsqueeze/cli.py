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
    EXIT_INTERRUPTED,
    checkpoint_options,
    common,
    defaults,
    device_option,
    make_console,
    method_options,
)
from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import WEIGHT_METHODS
from llmsqueeze.methods.base import Target
from llmsqueeze.recipe import DTYPES, ORDERS, Calibration, PruneRecipe, method_config

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console

EXIT_TERMINATED = 143

CHECKPOINT_HELP = """CHECKPOINT is a Hugging Face directory, a hub id (ORG/NAME[@REVISION]), a .gguf
file, a llmsqueeze checkpoint, or `demo` (SmolLM2-135M-Instruct)."""


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


METHODS_HELP = "\n".join(f"  {name:<11}{entry.summary}" for name, entry in WEIGHT_METHODS.items())


@cli.command(
    help=f"""Prune the weights of CHECKPOINT and write a smaller checkpoint to OUT.

{CHECKPOINT_HELP}

\b
Methods:
{METHODS_HELP}

Embeddings and lm_head are never pruned. The model is read and written one block at a time.
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--method", type=click.Choice(list(WEIGHT_METHODS)), default="wanda",
              show_default=True, help="How weights are chosen.")  # fmt: skip
@click.option("--sparsity", type=float, help="Fraction to remove, in [0, 1).  [default: 0.5]")
@click.option("--pattern", default="unstructured", show_default=True,
              help="unstructured, or N:M: N kept of every M inputs.")  # fmt: skip
@click.option("--ignore", multiple=True, metavar="NAME",
              help="Linear to leave dense: full name, last part (down_proj), or re:REGEX. "
              "Repeatable.")  # fmt: skip
@method_options
@click.option("--calib", metavar="TEXT", default=defaults("text"),
              help="Calibration text: FILE.txt, FILE.jsonl, or a hub dataset NAME[:CONFIG[:SPLIT]]. "
              "[default: bundled texts]")  # fmt: skip
@click.option("--samples", type=int, default=defaults("samples"), show_default=True,
              help="Calibration windows.")  # fmt: skip
@click.option(
    "--seqlen", type=int, help="Tokens per window.  [default: 2048, or what the model has]"
)
@click.option("--seed", type=int, default=defaults("seed"), show_default=True,
              envvar="LLMSQUEEZE_SEED",
              help="Shuffles bundled texts and document collections; a .txt is never shuffled.")  # fmt: skip
@click.option("--bos", is_flag=True, help="Start the text with the beginning-of-text token.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="Precision of calibration; auto: the checkpoint's where the device computes in it "
              "natively, else float32.")  # fmt: skip
@click.option(
    "--batch-size", type=int, default=0, help="Samples per forward pass.  [default: auto]"
)
@click.option("--order", type=click.Choice(ORDERS), default="group", show_default=True,
              help="group: measure q/k/v, compress, measure o, …: one pass. "
              "block: measure the whole uncompressed block: two passes, less memory.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@device_option
@checkpoint_options
@common
def prune(
    console: Console,
    checkpoint: str,
    out: Path,
    method: str,
    sparsity: float | None,
    pattern: str,
    ignore: tuple[str, ...],
    calib: str | None,
    samples: int,
    seqlen: int | None,
    seed: int,
    bos: bool,
    dtype: str,
    batch_size: int,
    order: str,
    overwrite: bool,
    device: str,
    offline: bool,
    cache_dir: Path,
    **method_fields: Any,
) -> None:
    given = {name: value for name, value in method_fields.items() if value is not None}
    recipe = PruneRecipe(
        method=method,
        target=Target.parse(sparsity, pattern),
        config=method_config(method, given),
        ignore=ignore,
        calibration=Calibration(calib, samples, seqlen, seed, bos),
        dtype=dtype,
        batch=batch_size,
        order=order,
    )

    from llmsqueeze import compress
    from llmsqueeze.artifact import check_output
    from llmsqueeze.console import facts, size
    from llmsqueeze.device import choose_device

    check_output(out, overwrite)
    where = choose_device(device)
    opened, name = _open(console, checkpoint, offline, cache_dir)
    with console.steps("pruning block") as progress:
        report = compress.prune(
            opened, name, out, recipe, where, overwrite=overwrite,
            on_block=lambda b: progress(b.index + 1, b.total, f"{b.seconds:.1f} s"),
        )  # fmt: skip
    manifest = report.manifest
    document = {
        "out": str(out),
        "method": method,
        "pattern": recipe.target.pattern_name,
        "sparsity": report.sparsity,
        "bytes": {"before": manifest.bytes_before, "after": manifest.bytes_after},
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "sites": _sites(manifest),
    }
    rows = {
        "method": f"{method}, {recipe.target.pattern_name}",
        "sparsity": f"{report.sparsity:.2%} of {len(manifest.sites)} linears",
        "size": f"{size(manifest.bytes_before)} → {size(manifest.bytes_after)} "
        f"({manifest.bytes_after / manifest.bytes_before:.0%})",
        "time": f"{report.seconds:.1f} s",
        "peak memory": size(report.peak_rss_bytes) + " host"
        + (f", {size(report.peak_device_bytes)} device" if report.peak_device_bytes else ""),
        "next": f"llmsqueeze eval {out} --against {checkpoint}",
    }  # fmt: skip
    console.result(document, facts(str(out), rows))


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

    from llmsqueeze.compress import check_vocabulary, window_length
    from llmsqueeze.console import facts
    from llmsqueeze.data import Windows, evaluation_windows, load_tokenizer
    from llmsqueeze.device import choose_device, evaluation_dtype
    from llmsqueeze.evaluate import Perplexity, perplexity
    from llmsqueeze.runtime import load

    where = choose_device(device)
    opened, name = _open(console, checkpoint, offline, cache_dir)
    other = _open(console, against, offline, cache_dir) if against else None
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
        with console.steps(f"{label} window") as progress:
            return perplexity(model, cutting.tokens, lambda d, t: progress(d, t, ""))

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

    opened, name = _open(console, checkpoint, offline, cache_dir)
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
        document |= {"sites": _sites(manifest), "steps": manifest.steps}
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
    opened, name = _open(console, checkpoint, offline, cache_dir)
    with console.steps("converting block") as progress:
        manifest = compress.convert(
            opened, name, out, format, overwrite=overwrite,
            on_block=lambda b: progress(b.index + 1, b.total, f"{b.seconds:.1f} s"),
        )  # fmt: skip
    document = {
        "out": str(out),
        "format": format,
        "bytes": {"before": manifest.bytes_before, "after": manifest.bytes_after},
        "sites": _sites(manifest),
    }
    rows = {
        "format": format + (": same size, same speed as the original" if format == "dense" else ""),
        "size": f"{size(manifest.bytes_before)} → {size(manifest.bytes_after)}",
    }
    console.result(document, facts(str(out), rows))


def _open(console: Console, spec: str, offline: bool, cache_dir: Path) -> tuple[Checkpoint, str]:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.source import locate

    located = locate(spec, offline=offline, cache=cache_dir, note=console.note)
    return Checkpoint(located.path), located.name


def _sites(manifest: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(record.shape),
            "sparsity": record.sparsity,
            "encoding": record.encoding,
            "bytes": {"before": record.bytes_before, "after": record.bytes_after},
            **record.report,
        }
        for name, record in manifest.sites.items()
    ]


def _terminate(number: int, frame: FrameType | None) -> None:
    # Unwinds like an error, so that the half-written directory is removed.
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    main()
