"""`llmsqueeze bench`: kernels on this GPU, and whole models on it or on a CPU, against dense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    CHECKPOINT_HELP,
    checkpoint_options,
    common,
    conclude,
    condition_options,
    device_option,
    open_checkpoint,
    skip_mass_option,
)
from llmsqueeze.conditions import Condition
from llmsqueeze.errors import RecipeError
from llmsqueeze.report.schema import BENCH_KERNELS, BENCH_MODEL

if TYPE_CHECKING:
    from llmsqueeze.bench_model import Comparison, Speed
    from llmsqueeze.console import Console

DEFAULT_SHAPES = "4096x4096,14336x4096,28672x4096,4096x14336"


@click.group()
def bench() -> None:
    """Measure how fast compressed weights are here, beside dense ones and the byte bound."""


@bench.command(
    help="""Every kernel on matrices of random weights, pruned to its pattern.

Weights are cold: one CUDA graph walks through more than half a gigabyte of different copies. Dense is the
fastest of cuBLAS and, for one token, a Triton kernel. The bound is how many times fewer bytes the weights
are. A kernel whose result is off stops the run.
"""
)
@click.option("--shapes", default=DEFAULT_SHAPES, show_default=True, metavar="ROWSxCOLUMNS,…")
@click.option("--tokens", default="1", show_default=True, metavar="N,…", help="Rows of x.")
@common
def kernels(console: Console, shapes: str, tokens: str) -> None:
    sizes = [_pair(text) for text in shapes.split(",")]
    counts = [_number(text) for text in tokens.split(",")]

    import torch
    from rich.table import Table

    from llmsqueeze import bench as library

    table = Table()
    for name in (
        "rows × columns",
        "tokens",
        "kernel",
        "µs",
        "GB/s",
        "bound",
        "× dense",
        "of bound",
    ):
        table.add_column(name, no_wrap=True)
    found = []
    for row in library.table(sizes, counts):
        entry = library.as_json(row)
        found.append(entry)
        console.note(
            f"{row.rows} × {row.columns}, {row.tokens}: {row.kernel} {row.timing.median:.2f} µs"
        )
        table.add_row(
            f"{row.rows}×{row.columns}", str(row.tokens), row.kernel, f"{row.timing.median:.2f}",
            f"{row.gigabytes():.0f}", f"{row.bound:.2f}", f"{row.speedup:.2f}",
            f"{row.speedup / row.bound:.0%}",
        )  # fmt: skip
    document = {
        "schema": BENCH_KERNELS, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "rows": found,
    }  # fmt: skip
    console.result(document, table)


@bench.command(
    help=f"""Decode with CHECKPOINT, and with the same weights made dense, in the same way.

{CHECKPOINT_HELP}

Greedy, batch 1, a cache of fixed size, on a GPU every step one CUDA graph. There both are compiled by
torch.compile, which takes a minute each; --no-compile leaves it out. Every operator's result is compared with
its reference first. A quantised KV cache (quantize-kv) is read as it lies, beside one that is not quantised.

On a CPU each model has a process of its own, whose memory is told, and they take turns; dense is the faster
of bfloat16 and float32.
"""
)
@click.argument("checkpoint")
@click.option("--prompt", type=int, default=128, show_default=True, help="Tokens of the prompt.")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="[default: compile on a GPU]"
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="[default: bfloat16 on a GPU, on a CPU float32 for what is compressed]")  # fmt: skip
@skip_mass_option
@condition_options
@click.option("--min-speedup", type=float, metavar="TIMES",
              help="End with exit code 1 if decoding is not so many times as fast.")  # fmt: skip
@device_option
@checkpoint_options
@common
def model(
    console: Console, checkpoint: str, prompt: int, compiled: bool | None, dtype: str | None,
    skip_mass: float, fail_if: tuple[str, ...], min_speedup: float | None, device: str, offline: bool,
    cache_dir: Path,
) -> None:  # fmt: skip
    if prompt < 16:
        raise RecipeError(f"--prompt {prompt}: at least 16 tokens are needed")
    conditions = [Condition.parse(condition) for condition in fail_if]
    if min_speedup is not None:
        conditions.append(Condition.parse(f"speedup < {min_speedup}"))

    import torch

    from llmsqueeze import bench_cpu, bench_model
    from llmsqueeze.data import evaluation_windows, load_tokenizer
    from llmsqueeze.device import choose_device

    where = choose_device(device)
    gpu = where.type == "cuda"
    if not gpu and compiled:
        raise RecipeError("--compile is for GPUs; leave it out on a CPU")
    if gpu and dtype == "float32":
        raise RecipeError("on a GPU kernels compute in bfloat16 or float16; use --dtype bfloat16")
    compiled = gpu and compiled is not False
    dtype = dtype or ("bfloat16" if gpu else "float32")
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    if skip_mass and opened.kv_cache is None:
        raise RecipeError("--skip-mass is about a quantised KV cache; run quantize-kv first")
    tokenizer = load_tokenizer(opened.path)
    tokens = evaluation_windows(None, tokenizer, seqlen=prompt, windows=1, bos=False).tokens[0]
    precision = getattr(torch, dtype)
    device_facts: dict[str, Any]
    if gpu:
        found = bench_model.compare(
            opened,
            tokens,
            precision,
            where,
            compiled=compiled,
            skip_mass=skip_mass,
            note=console.note,
        )
        device_facts = {"gpu": torch.cuda.get_device_name(where)}
    else:
        found = bench_cpu.compare(opened, tokens, precision, skip_mass=skip_mass, note=console.note)
        device_facts = {
            "cpu": bench_cpu.processor(), "threads": torch.get_num_threads(),
            "dense_dtype": str(found.dense_dtype).removeprefix("torch."),
            "slower_dense": found.slower_dense and _speed(found.slower_dense),
        }  # fmt: skip
    document = {
        "schema": BENCH_MODEL, "checkpoint": name, "manifest_sha256": opened.manifest_sha256,
        **device_facts, "torch": torch.__version__,
        "dtype": dtype, "prompt": prompt, "compiled": compiled, "skip_mass": skip_mass,
        "formats": found.formats,
        "dense": _speed(found.dense), "compressed": _speed(found.compressed),
        "speedup": found.speedup, "bound": found.bound, "error": found.error,
        "logit_error": found.logit_error, "same_tokens": found.same_tokens, "tokens": found.tokens,
    }  # fmt: skip
    conclude(console, document, name, _rows(found), conditions)


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "ms_per_token": speed.step.median, "range": [speed.step.least, speed.step.most],
        "prefill_ms": speed.prefill.median, "weight_bytes": speed.weights,
        "bytes_per_token": speed.read, "cache_bytes": speed.cache, "load_seconds": speed.load_seconds,
        **({} if speed.resident is None else {"resident_bytes": speed.resident,
                                              "peak_resident_bytes": speed.peak}),
    }  # fmt: skip


def _rows(found: Comparison) -> dict[str, str]:
    from llmsqueeze.console import size

    dense, mine = found.dense, found.compressed
    linears = ", ".join(f"{count} {format}" for format, count in found.formats.items())
    memory = {}
    if mine.resident is not None and dense.resident is not None:
        slow = found.slower_dense
        memory = {
            "memory of the process": f"{size(mine.resident)}, dense {size(dense.resident)}",
            "at most": f"{size(mine.peak or 0)}, dense {size(dense.peak or 0)}",
            "dense": f"{str(found.dense_dtype).removeprefix('torch.')}, otherwise "
            f"{1e3 / slow.step.median:.1f} tokens/s" if slow else "",
        }  # fmt: skip
    return {
        "linears in kernels": linears or "none: too few zeros",
        "decoding": f"{1e3 / mine.step.median:.1f} tokens/s, dense {1e3 / dense.step.median:.1f}",
        "speedup": f"{found.speedup:.2f}× (bound by bytes: {found.bound:.2f}×)",
        "prompt": f"{mine.prefill.median:.1f} ms, dense {dense.prefill.median:.1f}",
        "weights": f"{size(mine.weights)}, dense {size(dense.weights)}",
        "read per token": f"{size(mine.read)}, dense {size(dense.read)}",
        "of it KV cache": f"{size(mine.cache)}, dense {size(dense.cache)}",
        **memory,
        "loading": f"{mine.load_seconds:.1f} s, dense {dense.load_seconds:.1f}",
        "check": f"operators off by {found.error:.1e} at most, logits by {found.logit_error:.1%} from dense "
        f"computed alike; first {found.same_tokens} of {found.tokens} greedy tokens the same",
    }


def _pair(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\s*[1-9]\d*x[1-9]\d*\s*", text):
        raise RecipeError(f"--shapes {text}: write ROWSxCOLUMNS, as 4096x4096")
    rows, columns = text.split("x")
    pair = int(rows), int(columns)
    if pair[0] % 16 or pair[1] % 16:
        raise RecipeError(f"--shapes {text}: rows and columns must be divisible by 16")
    return pair


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RecipeError(f"--tokens: {text!r} is no positive number")
    return int(text)
