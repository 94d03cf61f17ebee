"""`llmsqueeze eval`: perplexity of a checkpoint, and of the dense model beside it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    CHECKPOINT_HELP,
    backend_option,
    checkpoint_options,
    common,
    conclude,
    condition_options,
    device_option,
    open_checkpoint,
)
from llmsqueeze.conditions import Condition, parse_size
from llmsqueeze.errors import DataError, RecipeError
from llmsqueeze.policy import DEFAULT_GATE
from llmsqueeze.recipe import DTYPES

if TYPE_CHECKING:
    from llmsqueeze.checkpoint import Checkpoint
    from llmsqueeze.console import Console
    from llmsqueeze.evaluate import Perplexity
    from llmsqueeze.passkey import Retrieval
    from llmsqueeze.policy import Policy

# Gaps between the share of inputs that gates drop and the one they were calibrated for, worth a warning.
MEAN_DRIFT, SITE_DRIFT = 0.01, 0.03
PASSKEY_PROMPTS = 20


@dataclass(frozen=True)
class Measured:
    """What was found out about one checkpoint. dropped: share of inputs by gate, of one with gates;
    kv_bits: by element, with a packed cache."""

    perplexity: Perplexity
    dropped: dict[str, float] | None
    kv_bits: float | None
    retrieval: Retrieval | None


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

For pipelines: --fail-if and --max-size end with exit code 1, which nothing else does. What was not measured
fails.
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
@click.option("--bos", is_flag=True, help="Start the text with the beginning-of-text token.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="Precision; auto: the checkpoint's on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--gate", metavar="POLICY",
              help="Tokens of a window that are gated: after:TOKENS, tail:SHARE, all or dense. TEAL is "
              "published with tail:0.5, R-Sparse tail:0.9, WINA tail:0.99, CHESS all."
              f"  [default: {DEFAULT_GATE}]")  # fmt: skip
@click.option("--kv-cache", metavar="FORMAT",
              help="Quantise the KV cache: fp8, rotate:4, rotate:3 or rotate:2 (Hadamard and the best codes "
              "of a normal distribution; no calibration) or none.  [default: CHECKPOINT's]")  # fmt: skip
@backend_option
@click.option("--passkey", is_flag=True,
              help="Also measure how often a key hidden in a long text is found.")  # fmt: skip
@condition_options
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
    fail_if: tuple[str, ...],
    max_size: str | None,
    device: str,
    offline: bool,
    cache_dir: Path,
) -> None:
    if windows is not None and windows < 1:
        raise RecipeError(f"--windows {windows}: at least one window is needed")
    if seqlen is not None and seqlen < 2:
        raise RecipeError(f"--seqlen {seqlen}: a window needs at least two tokens")
    if against and baseline:
        raise RecipeError(
            "--against measures the dense model, --baseline knows it: give one of them"
        )
    conditions = [Condition.parse(condition) for condition in fail_if]
    if max_size is not None:
        conditions.append(Condition("size_bytes", ">", parse_size(max_size)))
    earlier = _read_baseline(baseline) if baseline else None

    import torch

    from llmsqueeze.data import (
        BUNDLED_EVALUATION,
        Windows,
        bundled_text,
        evaluation_windows,
        load_tokenizer,
    )
    from llmsqueeze.device import choose_backend, choose_device, evaluation_dtype
    from llmsqueeze.evaluate import perplexity
    from llmsqueeze.ops import cpu
    from llmsqueeze.passkey import make_prompts, retrieve
    from llmsqueeze.plan import check_vocabulary, window_length
    from llmsqueeze.policy import Policy
    from llmsqueeze.runtime import load
    from llmsqueeze.runtime.gates import gating_of
    from llmsqueeze.runtime.kv_cache import (
        attached_cache,
        bits_per_element,
        packed_cache,
        parse_format,
    )
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
    built = cpu.library() is not None
    backend = choose_backend(backend, where, precision, built=built, decoding=False)

    def cut(source: Checkpoint) -> Windows:
        tokenizer = load_tokenizer(source.path)
        made = evaluation_windows(text, tokenizer, seqlen=length, windows=windows, bos=bos)
        check_vocabulary(made.tokens, source)
        return made

    def measure(source: Checkpoint, label: str, packed: bool = False) -> Measured:
        model = load(source, precision, where, kernels=backend == "kernels")
        gating = gating_of(model)
        if gating:
            gating.policy = policy
            gating.count()
        last: list[Any] = []

        def new_cache() -> Any:
            last[:] = [packed_cache(model, kv_format) if kv_format else attached_cache(model)]
            return last[0]

        cache = new_cache if packed else None
        with console.steps() as progress:
            found = perplexity(
                model,
                cutting.tokens,
                lambda done, of: progress(f"{label} window", done, of, ""),
                cache,
            )
            bits = bits_per_element(last[0]) if last else None
            dropped = gating.sparsity() if gating else None
            answers = None
            if prompts:
                answers = retrieve(
                    model, prompts, lambda done, of: progress(f"{label} key", done, of, ""), cache
                )
        return Measured(found, dropped, bits, answers)

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
    stored = opened.kv_cache if kv_cache is None else None
    measured = measure(opened, "eval", packed=bool(kv_format or stored))
    mine = measured.perplexity
    document: dict[str, Any] = {
        "checkpoint": name,
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
        earlier = {"checkpoint": other[1], "token_ppl": dense, "passkey": answers}
    if earlier:
        dense = earlier["token_ppl"]
        ratio = mine.token_ppl / dense
        document |= {
            "against": earlier["checkpoint"],
            "dense_token_ppl": dense,
            "token_ppl_ratio": ratio,
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
        document["activation"] = gates = _activation(opened, measured.dropped, policy)
        rows |= _activation_rows(gates)
        for message in drifts(gates):
            console.note(message)
    conclude(console, document, name, rows, conditions)


def _read_baseline(path: Path) -> dict[str, Any]:
    """The report of an earlier `eval --json`; DataError if it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        usable = isinstance(report["checkpoint"], str) and 0 < report["token_ppl"] < math.inf
    except OSError as error:
        raise DataError(f"--baseline {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"--baseline {path}: not a report of `eval --json`") from error
    if not usable:
        raise DataError(f"--baseline {path}: its perplexity is {report['token_ppl']}")
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


def drifts(measured: dict[str, Any]) -> list[str]:
    """Warnings where gates drop another share of this text than they were calibrated for."""
    gaps = {
        name: gate["measured"] - gate["target"]
        for name, gate in measured["gates"].items()
        if gate["measured"] is not None
    }
    if not gaps:
        return []
    mean = sum(gaps.values()) / len(gaps)
    far = {name: gap for name, gap in gaps.items() if abs(gap) > SITE_DRIFT}
    messages = []
    if abs(mean) > MEAN_DRIFT:
        messages.append(
            f"warning: on this text the gates drop {mean:+.1%} against their calibration on average; "
            "calibrate on text like it (sparsify --calib)"
        )
    if far:
        worst = max(far, key=lambda name: abs(far[name]))
        messages.append(
            f"warning: {len(far)} of {len(gaps)} gates are off by more than {SITE_DRIFT:.0%}, most "
            f"{worst}: {far[worst]:+.1%}"
        )
    return messages
