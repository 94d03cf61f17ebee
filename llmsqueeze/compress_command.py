"""`llmsqueeze compress`: prune, encode, sparsify and quantize-kv by one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze import untrusted
from llmsqueeze.command import (
    CHECKPOINT_HELP,
    RESUME_HELP,
    check_free,
    check_windows,
    checkpoint_options,
    common,
    conclude,
    device_option,
    open_checkpoint,
    resume_option,
    working,
)
from llmsqueeze.conditions import Condition
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe_options import PRESET_SUMMARIES, ask, recipe_options

if TYPE_CHECKING:
    import torch

    from llmsqueeze.artifact import Manifest
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console
    from llmsqueeze.step_recipes import Step

DEFAULT_WINDOWS = 8


@click.command(
    help=f"""Prune, encode, sparsify and quantize-kv CHECKPOINT by one recipe, into one checkpoint.

{CHECKPOINT_HELP}

The recipe is YAML: steps (prune, encode, sparsify, quantize-kv) and their settings, those of each command's
own --recipe; a step without settings takes the defaults. encode rounds linears to int8. Steps are done in
that order, and the result is what the commands would give one after another. A llmsqueeze.json is a recipe,
too: it says how its checkpoint was made, and that is done again. `llmsqueeze recipe show` prints one in full.

\b
Presets (--preset); README has what they cost:
{PRESET_SUMMARIES}

{RESUME_HELP} Training masks goes on from its last saved step; a walk that only writes (encode alone)
and a search (--target-ppl-ratio) start anew.
"""
)
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New directory.")
@recipe_options
@click.option("--target-ppl-ratio", type=float, metavar="RATIO",
              help="Search the sparsities of sparsify and prune for the fewest bytes read per token at "
              "which perplexity is at most RATIO times the dense model's, as in 1.05. Exit code 1 and no "
              "checkpoint if there are none.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="[target] Text to measure on.  [default: the bundled evaluation text]")  # fmt: skip
@click.option("--windows", type=int,
              help=f"[target] Windows of it.  [default: {DEFAULT_WINDOWS}]")  # fmt: skip
@click.option("--seqlen", type=int,
              help="[target] Tokens per window.  [default: 2048, or what the model has]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@resume_option
@device_option
@checkpoint_options
@common
def compress(
    console: Console, checkpoint: str, out: Path, preset: str | None, recipe: Path | None,
    settings: tuple[str, ...], target_ppl_ratio: float | None, text: Path | None, windows: int | None,
    seqlen: int | None, overwrite: bool, resume: str, device: str, offline: bool, cache_dir: Path,
) -> None:  # fmt: skip
    asked = ask(preset, recipe, settings)
    if asked is None:
        raise RecipeError(
            "nothing to do: give --preset NAME, --recipe FILE or --set STEP.KEY=VALUE"
        )
    if target_ppl_ratio is None and any(given is not None for given in (text, windows, seqlen)):
        raise RecipeError("--text, --windows and --seqlen are those of --target-ppl-ratio: give it")
    check_windows(windows, seqlen)
    if target_ppl_ratio is not None and not 1 <= target_ppl_ratio < 100:
        raise RecipeError(
            f"--target-ppl-ratio {target_ppl_ratio} is outside [1, 100): 1.05 is 5 % more"
        )
    if target_ppl_ratio is not None and asked.manifest:
        raise RecipeError(
            "--target-ppl-ratio changes a recipe, and a manifest is made again as it was"
        )

    from llmsqueeze.allocator import return_freed
    from llmsqueeze.artifact import Manifest
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.compress import peak_device_bytes, peak_rss_bytes
    from llmsqueeze.console import facts, size
    from llmsqueeze.device import choose_device
    from llmsqueeze.expert_note import few_tokens
    from llmsqueeze.steps import run_steps
    from llmsqueeze.traffic import bytes_per_token

    wanted = None
    if (
        asked.manifest and "sites" in asked.raw
    ):  # as it was published, not only what recipe show prints
        wanted = Manifest.from_json(untrusted.read_text(asked.manifest, untrusted.LARGE))
    check_free(out, overwrite)
    return_freed()
    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    if target_ppl_ratio is not None:
        named = "allocation" in (asked.raw.get("prune") or {})
        _search(
            console, opened, name, out, asked.steps, where, target_ppl_ratio, text, windows, seqlen,
            named, overwrite,
        )  # fmt: skip
        return
    with console.steps() as progress, working(console, out, where, resume) as work:
        walks = run_steps(
            opened, name, out, asked.steps, where, overwrite=overwrite, work=work,
            note=console.note,
            on_block=lambda command, b: progress(
                f"{command} block", b.index + 1, b.total, f"{b.seconds:.1f} s"
            ),
        )  # fmt: skip
    made = Checkpoint(out)
    before, after = bytes_per_token(opened), bytes_per_token(made)
    document: dict[str, Any] = {
        "out": str(out),
        "walks": [{"commands": list(w.commands), "seconds": w.seconds} for w in walks],
        "bytes": {"before": opened.stored_bytes, "after": made.stored_bytes},
        "bytes_per_token": {"before": before, "after": after},
        "kv_cache": str(made.kv_cache) if made.kv_cache else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(where),
    }
    rows = {
        "steps": ", ".join(f"{' + '.join(w.commands)} {w.seconds:.1f} s" for w in walks),
        "size": f"{size(opened.stored_bytes)} → {size(made.stored_bytes)}",
        "read per token": f"{size(before)} → {size(after)} ({after / before:.0%})",
    }
    if made.kv_cache:
        rows["kv cache"] = str(made.kv_cache)
    if made.manifest and (few := few_tokens(made.manifest.sites)):
        rows["experts"] = few
    if wanted and made.manifest:
        document["differences"] = different = differences(wanted, made.manifest)
        document["reproduced"] = not different
        rows["made again"] = "; ".join(different) or "bit for bit"
    rows["next"] = f"llmsqueeze eval {out} --against {checkpoint}"
    console.result(document, facts(str(out), rows))


def _search(
    console: Console, opened: Checkpoint, name: str, out: Path, steps: list[Step], where: torch.device,
    ratio: float, text: Path | None, windows: int | None, seqlen: int | None, named: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """compress --target-ppl-ratio."""
    import dataclasses

    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import size
    from llmsqueeze.data import evaluation_windows, load_tokenizer
    from llmsqueeze.device import evaluation_dtype
    from llmsqueeze.plan import check_vocabulary, window_length
    from llmsqueeze.runtime.backend import choose_backend
    from llmsqueeze.search import Goal, Point, search
    from llmsqueeze.traffic import bytes_per_token

    cut = evaluation_windows(
        text, load_tokenizer(opened.path), seqlen=window_length(opened, seqlen),
        windows=DEFAULT_WINDOWS if windows is None else windows,
    )  # fmt: skip
    check_vocabulary(cut.tokens, opened)
    precision = evaluation_dtype("auto", opened.dtype, where)
    backend = choose_backend(None, opened, precision, where)
    goal = Goal(ratio, cut.tokens, precision, backend == "kernels")
    described = {
        "target_ppl_ratio": ratio,
        "text": cut.describe(),
        "dtype": str(precision).removeprefix("torch."),
    }

    def tried(point: Point) -> None:
        what = ", ".join(f"{key} {value}" for key, value in point.settings.items())
        console.note(f"{what}: {size(point.bytes_per_token)} per token, ratio {point.ratio:.4f}")

    with console.steps() as progress:
        found = search(
            opened, name, out, steps, goal, where, named_allocation=named, describe=described,
            overwrite=overwrite, note=console.note, on_point=tried,
            on_block=lambda command, b: progress(
                f"{command} block", b.index + 1, b.total, f"{b.seconds:.1f} s"
            ),
        )  # fmt: skip
    before = bytes_per_token(opened)
    lowest = min(point.ratio for point in found.points)
    document: dict[str, Any] = {
        "out": str(out) if found.best else None,
        **described,
        "dense_token_ppl": found.dense_token_ppl,
        "points": [dataclasses.asdict(point) for point in found.points],
        "token_ppl_ratio": found.verified or lowest,
        "bytes_per_token": {"before": before},
    }
    rows = {"points tried": str(len(found.points))}
    if found.best:
        made = Checkpoint(out)
        document["settings"] = found.best.settings
        document["bytes_per_token"]["after"] = after = bytes_per_token(made)
        document["bytes"] = {"before": opened.stored_bytes, "after": made.stored_bytes}
        rows |= {
            "found": ", ".join(f"{key} {value}" for key, value in found.best.settings.items()),
            "ratio": f"{found.verified:.4f}, measured on what was written",
            "size": f"{size(opened.stored_bytes)} → {size(made.stored_bytes)}",
            "read per token": f"{size(before)} → {size(after)} ({after / before:.0%})",
        }
    elif found.verified:
        rows["found"] = (
            f"nothing: measured again the best had {found.verified:.4f}; nothing was written"
        )
    else:
        rows["found"] = f"nothing: the lowest ratio was {lowest:.4f}; nothing was written"
    missed = Condition("token_ppl_ratio", ">", ratio)
    conclude(console, document, str(out), rows, [missed])


def differences(wanted: Manifest, made: Manifest) -> list[str]:
    """Where `made` holds other bytes than `wanted`, and what may be why; none: bit for bit the same."""
    files = [name for name, record in wanted.shards.items() if made.shards.get(name) != record]
    if (wanted.activation and wanted.activation.file) != (made.activation and made.activation.file):
        files.append("thresholds")
    if (wanted.kv_cache and wanted.kv_cache.file) != (made.kv_cache and made.kv_cache.file):
        files.append("codebooks")
    if not files:
        return []
    found = [f"other bytes in {', '.join(files)}"]
    if len(wanted.steps) != len(made.steps):
        found.append("the checkpoint had steps of its own")
    elif wanted.steps[0]["source"]["sha256"] != made.steps[0]["source"]["sha256"]:
        found.append("another source")
    for was, now in zip(wanted.steps, made.steps, strict=False):
        found += [
            f"{was['command']}: another {name.replace('_', ' ')}"
            for name, known in (
                (
                    "calibration text",
                    [(s.get("calibration") or {}).get("tokens_sha256") for s in (was, now)],
                ),
                ("precision", [s.get("compute_dtype") for s in (was, now)]),
                ("version of what it ran on", [s.get("versions") for s in (was, now)]),
            )
            if known[0] != known[1]
        ]
    return found
