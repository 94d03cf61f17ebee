"""`llmsqueeze eval`: perplexity of a checkpoint, and of the dense model beside it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze import untrusted
from llmsqueeze.command import (
    CHECKPOINT_HELP,
    backend_option,
    check_windows,
    checkpoint_options,
    common,
    conclude,
    condition_options,
    device_option,
    open_checkpoint,
)
from llmsqueeze.conditions import Condition, parse_size
from llmsqueeze.errors import DataError, EnvironmentFault, RecipeError
from llmsqueeze.policy import DEFAULT_GATE
from llmsqueeze.recipe import DTYPES
from llmsqueeze.recovery import check_requests, compare, gates, parse_gates
from llmsqueeze.recovery import rows as task_rows
from llmsqueeze.recovery import warnings as task_warnings
from llmsqueeze.report.schema import BASELINE, EVAL, fault

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console
    from llmsqueeze.evaluate import Perplexity
    from llmsqueeze.passkey import Retrieval
    from llmsqueeze.policy import Policy
    from llmsqueeze.subject import Subject
    from llmsqueeze.tasks import Suite

PASSKEY_PROMPTS = 20


@dataclass(frozen=True)
class Measured:
    """What was found out about one checkpoint. dropped: share of inputs by gate, of one with gates;
    kv_bits: by element, with a packed cache. tasks: by their names in the report; tasks_dropped: as dropped,
    while they ran."""

    perplexity: Perplexity
    dropped: dict[str, float] | None
    kv_bits: float | None
    retrieval: Retrieval | None
    tasks: dict[str, Any]
    tasks_dropped: dict[str, float] | None


@click.command(
    "eval",
    help=f"""Measure the perplexity of CHECKPOINT, and of the dense model beside it.

{CHECKPOINT_HELP}

token_ppl: the text is tokenised once and cut into windows; the exponential of the mean
cross-entropy over seqlen-1 predictions per window. Not comparable with word perplexity.

A checkpoint with activation thresholds is measured as it decodes: every token but the first few goes
through the gates (--gate), whatever it does with prompts. What the gates dropped is measured beside.

--passkey also hides a five-digit key at 20 depths of a text of --seqlen tokens, and asks for it: what
perplexity hardly notices.

A checkpoint with a KV-cache format, or any with --kv-cache, is measured with every key and value quantised
as it is cached, the prompt's and the newest token's included; attention sees only what was read back.
Bits are those allocated, scales, outliers and sinks included.

--tasks also runs tasks of lm-eval (pip install 'llmsqueeze[eval]'), with the same gates and KV cache. A task
is a name, an lm-eval .yaml, or a .json or .jsonl of items {{"query", "choices", "gold"}}. Scores of the model
of --against are kept in --cache-dir, by a hash of checkpoint, requests, settings and versions.

For pipelines: --fail-if, --min-recovery and --max-size end with exit code 1, which nothing else does. What
was not measured fails.
""",
)
@click.argument("checkpoint")
@click.option("--against", metavar="DENSE", help="Also measure this one, with the same settings.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="REPORT",
              help="What an earlier `eval --json` of the dense model printed, with the same settings: "
              "instead of --against.")  # fmt: skip
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 text file.  [default: bundled]"
)
@click.option(
    "--seqlen", type=int, help="Tokens per window.  [default: 2048, or what the model has]"
)
@click.option("--windows", type=int, help="Only the first so many windows.  [default: all]")
@click.option("--bos/--no-bos", default=False,
              help="Start the text, and every item of a task, with the beginning-of-text token.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="Precision; auto: the checkpoint's on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--gate", metavar="POLICY",
              help="Tokens of a window, or of a task's request, that are gated: after:TOKENS, tail:SHARE, "
              "all or dense. TEAL is published with tail:0.5, R-Sparse tail:0.9, WINA tail:0.99, CHESS all."
              f"  [default: {DEFAULT_GATE}]")  # fmt: skip
@click.option("--kv-cache", metavar="FORMAT",
              help="Quantise the KV cache: fp8, rotate:4, rotate:3 or rotate:2 (Hadamard and the best codes "
              "of a normal distribution; no calibration) or none.  [default: CHECKPOINT's]")  # fmt: skip
@backend_option
@click.option("--passkey", is_flag=True,
              help="Also measure how often a key hidden in a long text is found.")  # fmt: skip
@click.option("--tasks", multiple=True, metavar="TASK,…",
              help="Also run these tasks of lm-eval: names or files. Repeatable.")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N",
              help="Solved examples before every item.  [default: what the task says, else 0]")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="Only the first so many items of every task.  [default: all]")  # fmt: skip
@condition_options
@click.option("--min-recovery", multiple=True, metavar="[TASK=]SHARE",
              help="End with exit code 1 if a task keeps less of the dense model's score, as in 0.95, "
              "piqa=0.97 or piqa.acc_norm=0.97; by default of its first metric. Repeatable.")  # fmt: skip
@click.option("--max-size", metavar="SIZE",
              help="End with exit code 1 if its safetensors files take more, as in 180MB.")  # fmt: skip
@device_option
@checkpoint_options
@common
def evaluate(
    console: Console,
    checkpoint: str,
    against: str | None,
    baseline: Path | None,
    text: Path | None,
    seqlen: int | None,
    windows: int | None,
    bos: bool,
    dtype: str,
    gate: str | None,
    kv_cache: str | None,
    backend: str | None,
    passkey: bool,
    tasks: tuple[str, ...],
    num_fewshot: int | None,
    limit: int | None,
    fail_if: tuple[str, ...],
    min_recovery: tuple[str, ...],
    max_size: str | None,
    device: str,
    offline: bool,
    cache_dir: Path,
) -> None:
    check_windows(windows, seqlen)
    if against and baseline:
        raise RecipeError(
            "--against measures the dense model, --baseline knows it: give one of them"
        )
    conditions = [Condition.parse(condition) for condition in fail_if]
    if max_size is not None:
        conditions.append(Condition("size_bytes", ">", parse_size(max_size)))
    least = parse_gates(min_recovery)
    if min_recovery and not (against or baseline):
        raise RecipeError(
            "--min-recovery compares with a dense model: give --against or --baseline"
        )
    if not tasks and (min_recovery or limit or num_fewshot is not None):
        raise RecipeError(
            "--min-recovery, --limit and --num-fewshot are for --tasks, which is not there"
        )
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentFault("--tasks needs lm-eval: pip install 'llmsqueeze[eval]'")
    earlier = _read_baseline(baseline) if baseline else None

    import torch

    from llmsqueeze.activation import drifts
    from llmsqueeze.data import (
        BUNDLED_EVALUATION,
        Windows,
        bundled_text,
        evaluation_windows,
        load_tokenizer,
    )
    from llmsqueeze.device import choose_device, evaluation_dtype
    from llmsqueeze.evaluate import perplexity
    from llmsqueeze.passkey import make_prompts, retrieve
    from llmsqueeze.plan import check_vocabulary, window_length
    from llmsqueeze.policy import Policy
    from llmsqueeze.runtime.backend import choose_backend
    from llmsqueeze.runtime.kv_cache import bits_per_element, parse_format
    from llmsqueeze.subject import prepare
    from llmsqueeze.traffic import bytes_per_token

    policy = Policy.parse(gate or DEFAULT_GATE)
    kv_format = parse_format(kv_cache) if kv_cache and kv_cache != "none" else None
    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    if gate and opened.activation is None:
        raise RecipeError(f"--gate: {name} has no activation thresholds; sparsify it first")
    other = open_checkpoint(console, against, offline, cache_dir) if against else None
    if other and other[0].config.get("vocab_size") != opened.config.get("vocab_size"):
        raise RecipeError(f"{against} and {checkpoint} have different vocabularies")
    precision = evaluation_dtype(dtype, opened.dtype, where)
    length = window_length(opened, seqlen)
    backend = choose_backend(backend, opened, precision, where, console.note)

    def cut(source: Checkpoint) -> Windows:
        tokenizer = load_tokenizer(source.path)
        made = evaluation_windows(text, tokenizer, seqlen=length, windows=windows, bos=bos)
        check_vocabulary(made.tokens, source)
        return made

    def measure(source: Checkpoint, label: str, packed: bool = False) -> Measured:
        subject = prepare(
            source, precision, where, kernels=backend == "kernels", policy=policy,
            kv_cache=kv_format if packed else None, stored_cache=packed,
        )  # fmt: skip
        gating, make = subject.gating, subject.cache
        if gating:
            gating.count()
        last: list[Any] = []

        def new_cache() -> Any:
            assert make is not None
            last[:] = [make()]
            return last[0]

        cache = new_cache if make else None
        with console.steps() as progress:
            found = perplexity(
                subject.model,
                cutting.tokens,
                lambda done, of: progress(f"{label} window", done, of, ""),
                cache,
            )
            bits = bits_per_element(last[0]) if last else None
            dropped = gating.sparsity() if gating else None
            answers = None
            if prompts:
                answers = retrieve(
                    subject.model,
                    prompts,
                    lambda done, of: progress(f"{label} key", done, of, ""),
                    cache,
                )
            scores: dict[str, Any] = {}
            tasks_dropped = None
            if suites:
                if gating:
                    gating.count()
                scores = score(source, subject, label, progress)
                tasks_dropped = gating.sparsity() if gating else None
        return Measured(found, dropped, bits, answers, scores, tasks_dropped)

    def score(
        source: Checkpoint, subject: Subject, label: str, progress: Callable[..., None]
    ) -> dict[str, Any]:
        """Every task on one model; the dense one's are kept."""
        from llmsqueeze.harness import HarnessLM
        from llmsqueeze.task_cache import TaskCache
        from llmsqueeze.tasks import run_all

        cache = None
        if label == "dense":
            way = {
                "dtype": settings["dtype"], "device": where.type, "backend": backend, "bos": bos,
                "gate": str(policy),
            }  # fmt: skip
            cache = TaskCache.of(cache_dir / "tasks", source.path, way, console.note)
        return run_all(
            suites,
            HarnessLM(subject, load_tokenizer(source.path), bos=bos),
            lambda name, done, of: progress(f"{label} {name}", done, of, ""),
            cache.get if cache else None,
        )

    cutting = cut(opened)
    settings = {
        "seqlen": length,
        "windows": len(cutting.tokens),
        "bos": bos,
        "dtype": str(precision).removeprefix("torch."),
        "text_sha256": cutting.text_sha256,
        "tokens_sha256": hashlib.sha256(cutting.tokens.numpy().tobytes()).hexdigest(),
    }
    if earlier:
        _check_baseline(earlier, settings, str(baseline))
    if other and not torch.equal(cut(other[0]).tokens, cutting.tokens):
        raise RecipeError(f"{against} and {checkpoint} tokenise the text differently")
    prompts = []
    if passkey:
        prompts = make_prompts(
            load_tokenizer(opened.path), bundled_text(BUNDLED_EVALUATION), length=length,
            count=PASSKEY_PROMPTS, bos=bos,
        )  # fmt: skip
        check_vocabulary(torch.cat([prompt.tokens for prompt in prompts]), opened)
    suites: list[Suite] = []
    if tasks:
        from llmsqueeze.task_cache import make_folder
        from llmsqueeze.tasks import load as load_tasks
        from llmsqueeze.tasks import quiet, split_specs

        if other:
            make_folder(cache_dir / "tasks")
        if not console.verbose:
            quiet()
        suites = load_tasks(
            split_specs(tasks), num_fewshot=num_fewshot, limit=limit, offline=offline,
            note=console.note,
        )  # fmt: skip
        if earlier:
            for suite in suites:
                check_requests(suite.sha256, earlier.get("tasks") or {}, f"--baseline {baseline}")
        judged = [name for suite in suites for name in suite.judged]
        conditions += gates(*least, judged, {name for suite in suites for name in suite.sha256})
    stored = opened.kv_cache if kv_cache is None else None
    measured = measure(opened, "eval", packed=bool(kv_format or stored))
    mine = measured.perplexity
    document: dict[str, Any] = {
        "schema": EVAL,
        "checkpoint": name,
        "manifest_sha256": opened.manifest_sha256,
        "token_ppl": mine.token_ppl,
        "seqlen": mine.seqlen,
        "windows": mine.windows,
        "tokens": mine.tokens,
        "bos": bos,
        "dtype": settings["dtype"],
        "device": str(where),
        "backend": backend,
        "text": cutting.source,
        "text_sha256": settings["text_sha256"],
        "tokens_sha256": settings["tokens_sha256"],
        "seconds": mine.seconds,
        "size_bytes": opened.file_bytes,
        "bytes_per_token": bytes_per_token(opened, dropped=measured.dropped or None),
    }
    rows = {f"token_ppl@{mine.seqlen}": f"{mine.token_ppl:.3f}"}
    if other:
        reference = measure(other[0], "dense")
        dense = reference.perplexity.token_ppl
        answers = reference.retrieval.describe() if reference.retrieval else None
        earlier = {
            "checkpoint": other[1],
            "token_ppl": dense,
            "size_bytes": other[0].file_bytes,
            "bytes_per_token": bytes_per_token(other[0]),
            "passkey": answers,
            "tasks": reference.tasks,
        }
    if earlier:
        dense = earlier["token_ppl"]
        ratio = mine.token_ppl / dense
        document |= {
            "against": earlier["checkpoint"],
            "dense_token_ppl": dense,
            "token_ppl_ratio": ratio,
            "dense_size_bytes": earlier.get("size_bytes"),
            "dense_bytes_per_token": earlier.get("bytes_per_token"),
        }
        rows |= {"dense": f"{dense:.3f}", "ratio": f"{ratio:.3f}"}
        if measured.retrieval and earlier.get("passkey"):
            document["dense_passkey"] = earlier["passkey"]
            rows["keys found, dense"] = f"{earlier['passkey']['accuracy']:.0%}"
    if measured.retrieval:
        document["passkey"] = measured.retrieval.describe()
        count, size_ = len(measured.retrieval.found), measured.retrieval.length
        rows["keys found"] = f"{measured.retrieval.accuracy:.0%} of {count} in {size_} tokens"
    rows |= {
        "text": f"{cutting.source}, {mine.windows} windows, {mine.tokens} predictions",
        "dtype": f"{document['dtype']}, {backend}",
    }
    if measured.kv_bits is not None:
        bits, format = measured.kv_bits, str(stored or kv_cache)
        document["kv_cache"] = {
            "format": format,
            "bits_per_element": bits,
            "quantised": "every update",
        }
        rows["kv cache"] = f"{format}, {bits:.2f} bits per element, quantised at every update"
    if measured.dropped is not None:
        document["activation"] = gated = _activation(opened, measured.dropped, policy)
        rows |= _activation_rows(gated)
        for message in drifts(gated):
            console.note(f"warning: {message}")
    if suites:
        document["tasks"] = scores = measured.tasks
        compare(scores, (earlier or {}).get("tasks") or {})
        if dropped := measured.tasks_dropped:
            gated["tasks"] = {"sparsity": sum(dropped.values()) / len(dropped)}
        rows |= task_rows(scores)
        for message in task_warnings(scores):
            console.note(message)
    conclude(console, document, name, rows, conditions)


def _read_baseline(path: Path) -> dict[str, Any]:
    """The report of an earlier `eval --json`; DataError if it is none."""
    try:
        report = untrusted.read_json(path, untrusted.LARGE)
    except (OSError, ValueError) as error:
        raise DataError(f"--baseline {path} {untrusted.reason(error)}") from error
    if found := fault(report, BASELINE):
        raise DataError(f"--baseline {path}: not a report of `eval --json`: {found}")
    return dict(report)


def _check_baseline(report: dict[str, Any], settings: dict[str, Any], path: str) -> None:
    """DataError unless it was measured with the same settings."""
    for name, value in settings.items():
        if report.get(name) != value:
            raise DataError(
                f"--baseline {path}: {name} was {report.get(name)!r}, now it is {value!r}; measure the "
                "dense model again"
            )


def _activation(
    checkpoint: Checkpoint, dropped: dict[str, float], policy: Policy
) -> dict[str, Any]:
    """What the gates did during the measurement. dropped: the share of inputs by gate."""
    from llmsqueeze.traffic import bytes_per_token

    record = checkpoint.activation
    assert record is not None
    return {
        "method": record.method,
        "gated": str(policy),
        "prefill": record.prefill,
        "sparsity": sum(dropped.values()) / len(dropped) if dropped else None,
        "bytes_per_token": bytes_per_token(checkpoint, dropped=dropped) if dropped else None,
        "gates": {
            name: {"target": gate.sparsity, "measured": dropped.get(name)}
            for name, gate in record.gates.items()
        },
    }


def _activation_rows(measured: dict[str, Any]) -> dict[str, str]:
    from llmsqueeze.console import size

    rows = {
        "gated tokens": f"{measured['gated']} (when it runs, of a prompt: {measured['prefill']})"
    }
    if measured["sparsity"] is not None:
        rows["inputs dropped"] = f"{measured['sparsity']:.1%} on average"
        rows["read per token"] = size(measured["bytes_per_token"])
    return rows
