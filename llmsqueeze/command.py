"""What all commands share: their common options, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llmsqueeze.errors import LlmsqueezeError, RecipeError
from llmsqueeze.interrupt import deferred
from llmsqueeze.launch import world
from llmsqueeze.methods import Entry
from llmsqueeze.recipe import DTYPES, config_fields

if TYPE_CHECKING:
    import torch

    from llmsqueeze.activation import ActivationRecord
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.conditions import Condition, Outcome
    from llmsqueeze.console import Console
    from llmsqueeze.kv_record import KvRecord
    from llmsqueeze.ranks import Team
    from llmsqueeze.work import Work

EXIT_FAILED = 1
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

CHECKPOINT_HELP = """CHECKPOINT is a Hugging Face directory, a hub id (ORG/NAME[@REVISION]), a .gguf
file, a llmsqueeze checkpoint, or `demo` (SmolLM2-135M-Instruct)."""


def make_console(
    *, json: bool = False, quiet: bool = False, verbose: bool = False, progress: bool = True
) -> Console:
    from llmsqueeze.console import Console

    mute = world().rank > 0
    return Console(json=json, quiet=quiet, verbose=verbose, progress=progress, mute=mute)


def common(body: Callable[..., None]) -> Callable[..., None]:
    """Options that every command takes, and the one place where failures become exit codes."""
    return _command(body, libraries)


def shared(body: Callable[..., None]) -> Callable[..., None]:
    """The same for commands that several ranks can share. They call `libraries` when they are one."""
    return _command(body, lambda verbose: None, ranks=True)


def light(body: Callable[..., None]) -> Callable[..., None]:
    """The same for commands that load no model, nor the libraries for it."""
    return _command(body, lambda verbose: None)


def _command(
    body: Callable[..., None], prepare: Callable[[bool], None], ranks: bool = False
) -> Callable[..., None]:

    @click.option("--json", "as_json", is_flag=True, envvar="LLMSQUEEZE_JSON",
                  help="One JSON document on stdout, nothing else there.")  # fmt: skip
    @click.option("-q", "--quiet", is_flag=True, envvar="LLMSQUEEZE_QUIET",
                  help="No notes and no progress.")  # fmt: skip
    @click.option("-v", "--verbose", is_flag=True, envvar="LLMSQUEEZE_VERBOSE",
                  help="Tracebacks and the messages of the libraries.")  # fmt: skip
    @click.option("--no-progress", is_flag=True, envvar="LLMSQUEEZE_NO_PROGRESS",
                  help="Plain lines instead of a progress bar.")  # fmt: skip
    @functools.wraps(body)
    def command(
        as_json: bool, quiet: bool, verbose: bool, no_progress: bool, **options: Any
    ) -> None:
        console = make_console(json=as_json, quiet=quiet, verbose=verbose, progress=not no_progress)
        try:
            if world().size > 1 and not ranks:
                raise RecipeError(
                    "only `prune`, `sparsify` and `quantize-kv` can be shared by several ranks; run this "
                    "without torchrun"
                )
            prepare(verbose)
            body(console=console, **options)
        except LlmsqueezeError as error:
            _fail(console, str(error), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _fail(console, "interrupted; nothing was published", EXIT_INTERRUPTED)
        except SystemExit:
            raise
        except MemoryError:
            _fail(console, "out of memory; try smaller --samples, --seqlen or --batch-size", 5)
        except OSError as error:
            if error.errno == errno.EPIPE:
                sys.exit(EXIT_BUG)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            message = "no space left on the disk; nothing was published" if full else str(error)
            _fail(console, message, 5 if full else 4)
        except Exception as error:
            from llmsqueeze.device import out_of_memory

            if out_of_memory(error):
                _fail(console, "out of memory; try smaller --samples, --seqlen or --batch-size", 5)
            _fail(
                console,
                f"{type(error).__name__}: {error} (this is a bug in llmsqueeze; -v shows where)",
                EXIT_BUG,
            )

    return command


def offline_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--offline", is_flag=True, envvar="LLMSQUEEZE_OFFLINE",
        help="Use only what is on this machine.",
    )(body)  # fmt: skip


def checkpoint_options(body: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that open a checkpoint."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmsqueeze"
    for option in (
        offline_option,
        click.option("--cache-dir", type=click.Path(path_type=Path), default=default,
                     envvar="LLMSQUEEZE_CACHE_DIR", help="Where converted .gguf files are kept."),
    ):  # fmt: skip
        body = option(body)
    return body


# Options of calibration_options that are keys of a recipe's calibration, and their names there.
CALIBRATION = {
    "calib": "text",
    "samples": "samples",
    "seqlen": "seqlen",
    "seed": "seed",
    "bos": "bos",
}


def condition_options(body: Callable[..., None]) -> Callable[..., None]:
    """--fail-if, on what a command reports."""
    option = click.option(
        "--fail-if", multiple=True, metavar="CONDITION",
        help='End with exit code 1 if this holds of the JSON report, as in "token_ppl_ratio > 1.05" or '
        '"passkey.accuracy < 0.6", or if it has no such number. Repeatable.',
    )  # fmt: skip
    return option(body)


def conclude(
    console: Console, document: dict[str, Any], title: str, rows: dict[str, str],
    conditions: Sequence[Condition],
) -> None:  # fmt: skip
    """Print the result, judged; exit code 1 if a condition to fail holds."""
    from llmsqueeze.conditions import judge

    outcomes = judge(document, conditions)
    if outcomes:
        document = {**document, "conditions": [outcome.describe() for outcome in outcomes]}
    settle(console, document, title, rows, outcomes)


def settle(
    console: Console, document: dict[str, Any], title: str, rows: dict[str, str],
    outcomes: Sequence[Outcome],
) -> None:  # fmt: skip
    """Print a result that was judged already; exit code 1 if a condition to fail holds."""
    from llmsqueeze.console import facts

    for outcome in outcomes:
        # A report judges one condition on several results: it passes if it does on all.
        name = f"fail if {outcome.condition}"
        failed = outcome.failed or rows.get(name) == "FAILED"
        rows[name] = "FAILED" if failed else "passed"
    console.result(document, facts(title, rows))
    for outcome in outcomes:
        if outcome.failed:
            console.failed(str(outcome))
    if any(outcome.failed for outcome in outcomes):
        sys.exit(EXIT_FAILED)


def config_options(
    *tables: dict[str, Entry], without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option per field of the Config classes behind these tables; the defaults stay there."""
    found = {
        name: (field, choice)
        for table in tables
        for choice in table
        for name, field in config_fields(table, choice).items()
        if name not in without
    }

    def add(body: Callable[..., None]) -> Callable[..., None]:
        for name, (field, choice) in sorted(found.items(), reverse=True):
            flag = "--" + name.replace("_", "-")
            switch = isinstance(field.default, bool)
            body = click.option(
                f"{flag}/--no-{flag[2:]}" if switch else flag,
                type=None if switch else _kind(field),
                default=None,
                help=f"[{choice}] {field.metadata['help']}  [default: {field.default}]",
            )(body)
        return body

    return add


def _kind(field: Any) -> Any:
    choices = field.metadata.get("choices")
    return click.Choice(choices) if choices else type(field.default)


def calibration_options(
    samples: int, seqlen: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of commands that calibrate; samples, seqlen: the defaults to state."""
    options = (
        click.option("--calib", metavar="TEXT",
                     help="Calibration text: FILE.txt, FILE.jsonl, or a hub dataset "
                     "NAME[:CONFIG[:SPLIT]].  [default: bundled texts]"),
        click.option("--samples", type=int, help=f"Calibration windows.  [default: {samples}]"),
        click.option("--seqlen", type=int, help=f"Tokens per window.  [default: {seqlen}]"),
        click.option("--seed", type=int, envvar="LLMSQUEEZE_SEED",
                     help="Shuffles bundled texts and document collections; a .txt is never shuffled."
                     "  [default: 0]"),
        click.option("--bos", is_flag=True, default=None,
                     help="Start the text with the beginning-of-text token."),
        click.option("--dtype", type=click.Choice(DTYPES),
                     help="Precision of calibration; auto: the checkpoint's where the device computes "
                     "in it natively, else float32.  [default: auto]"),
        click.option("--batch-size", type=int, help="Samples per forward pass.  [default: auto]"),
    )  # fmt: skip

    def add(body: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            body = option(body)
        return body

    return add


def skip_mass_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--skip-mass", type=click.FloatRange(0, 1, max_open=True), default=0.0, metavar="SHARE",
        help="Share of its weight, say 0.001, that decode attention over a quantised KV cache may leave "
        "out, in blocks of tokens that it all but ignores.  [default: 0, nothing]",
    )(body)  # fmt: skip


def backend_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--backend", type=click.Choice(["kernels", "reference"]),
        help="How compressed weights are computed with: as they are, by kernels, or made dense."
        "  [default: kernels, on a CPU and on a GPU in 16 bits; where there are none reference]",
    )(body)  # fmt: skip


def device_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--device", default="auto", show_default=True, envvar="LLMSQUEEZE_DEVICE",
        help="auto, cpu, cuda or cuda:N.",
    )(body)  # fmt: skip


def gpus_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--gpus", type=click.IntRange(min=1), metavar="N", envvar="LLMSQUEEZE_GPUS",
        help="Share the work among N processes, each with a GPU of its own, or on the CPU with "
        "--device cpu. The result has the same bytes. torchrun starts them as well.",
    )(body)  # fmt: skip


# Where a command says what of it can be resumed.
RESUME_HELP = """A run that is cut off goes on where it was, after its last block, when the same command is
given again; the bits are those of one that was not. SIGINT and SIGTERM end it after the block (exit code
75), a second one at once. Until then its state lies in OUT.work, beside OUT."""


def resume_option(body: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--resume", type=click.Choice(["auto", "required", "never"]), default="auto",
        show_default=True, envvar="LLMSQUEEZE_RESUME",
        help="auto: go on from the state in OUT.work if there is one, which must be of the same source, "
        "recipe, text and versions. required: only that. never: start anew and keep no state.",
    )(body)  # fmt: skip


@contextlib.contextmanager
def working(
    console: Console, out: Path, device: torch.device, resume: str, team: Team | None = None
) -> Iterator[Work]:
    """Where a command makes `out`, and what tells it to stop. team: the ranks that make it."""
    from llmsqueeze.ranks import ALONE
    from llmsqueeze.work import Work

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(deferred(console)) if resume != "never" else lambda: False
        yield Work(out, device, policy=resume, stop=stop, note=console.note, team=team or ALONE)


def took(report: Any) -> str:
    """How long a run took, for people."""
    before = f", after {report.resumed} blocks of an earlier run" if report.resumed else ""
    return f"{report.seconds:.1f} s{before}"


def check_free(out: Path, overwrite: bool) -> None:
    """RecipeError unless `out` may be written; what a run that was killed left over is put in order."""
    from llmsqueeze.artifact import check_output
    from llmsqueeze.work import sweep

    sweep(out)
    check_output(out, overwrite)


def check_windows(windows: int | None, seqlen: int | None) -> None:
    """RecipeError unless a text can be cut into so many windows of so many tokens."""
    if windows is not None and windows < 1:
        raise RecipeError(f"--windows {windows}: at least one window is needed")
    if seqlen is not None and seqlen < 2:
        raise RecipeError(f"--seqlen {seqlen}: a window needs at least two tokens")


def open_checkpoint(
    console: Console, spec: str, offline: bool, cache_dir: Path
) -> tuple[Checkpoint, str]:
    """CHECKPOINT as the user wrote it, opened, and what to call it."""
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.source import locate

    located = locate(spec, offline=offline, cache=cache_dir, note=console.note)
    return Checkpoint(located.path), located.name


def site_documents(manifest: Any) -> list[dict[str, Any]]:
    """What --json says of every site."""
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


def libraries(verbose: bool) -> None:
    """Keep the libraries' own warnings and bars off the terminal unless they are asked for."""
    import warnings

    if verbose:
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that no setting of transformers reaches
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _fail(console: Console, message: str, code: int) -> NoReturn:
    if console.verbose:
        traceback.print_exc()
    console.error(message, code)
    sys.exit(code)


def activation_document(record: ActivationRecord) -> dict[str, Any]:
    """What --json says of the gates of sparsified activations."""
    gates = {
        name: {
            "kind": gate.kind,
            "members": list(gate.members),
            "sparsity": gate.sparsity,
            "threshold": gate.threshold,
            "zeros": gate.zeros,
            "ratio": gate.ratio,
            "rank": gate.rank,
        }
        for name, gate in record.gates.items()
    }
    return {"method": record.method, "prefill": record.prefill, "gates": gates}


def kv_document(record: KvRecord) -> dict[str, Any]:
    """What --json says of a quantised KV cache."""
    return {
        "method": record.method,
        "bits": record.bits,
        "layers": len(record.layers),
        "outlier_slots": {"keys": record.key_slots, "values": record.value_slots},
        "sinks": record.sinks,
    }
