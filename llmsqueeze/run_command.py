"""`llmsqueeze run`: text from a checkpoint, as it is decoded."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    CHECKPOINT_HELP,
    backend_option,
    checkpoint_options,
    common,
    device_option,
    open_checkpoint,
    skip_mass_option,
)
from llmsqueeze.errors import EnvironmentFault, RecipeError
from llmsqueeze.recipe import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.console import Console
    from llmsqueeze.runtime.generate import Decoder


@click.command(
    help=f"""Let CHECKPOINT go on from PROMPT, greedily; without PROMPT, from what stdin says.

{CHECKPOINT_HELP}

A model with a chat template is asked as a user would ask it; --raw continues the text as it stands. On a CPU
and on a GPU in 16 bits compressed weights are computed with as they are, and attention reads a quantised KV
cache as it is. A checkpoint's KV-cache format and activation thresholds are used as stored.
"""
)
@click.argument("checkpoint")
@click.argument("prompt", required=False)
@click.option("--tokens", type=int, default=128, show_default=True, help="At most so many.")
@click.option("--raw", is_flag=True, help="No chat template.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
              help="Precision; auto: the checkpoint's on a GPU, float32 on a CPU.")  # fmt: skip
@skip_mass_option
@backend_option
@device_option
@checkpoint_options
@common
def run(
    console: Console, checkpoint: str, prompt: str | None, tokens: int, raw: bool, dtype: str,
    skip_mass: float, backend: str | None, device: str, offline: bool, cache_dir: Path,
) -> None:  # fmt: skip
    if tokens < 1:
        raise RecipeError(f"--tokens {tokens}: at least one token is needed")
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise RecipeError("the prompt is empty; give one, or pipe it in")

    from llmsqueeze.data import load_tokenizer, tokenizing
    from llmsqueeze.device import choose_device, evaluation_dtype
    from llmsqueeze.ops import cpu
    from llmsqueeze.plan import check_vocabulary
    from llmsqueeze.runtime import load
    from llmsqueeze.runtime.backend import choose_backend

    where = choose_device(device)
    opened, name = open_checkpoint(console, checkpoint, offline, cache_dir)
    if skip_mass and opened.kv_cache is None:
        raise RecipeError("--skip-mass is about a quantised KV cache; run quantize-kv first")
    tokenizer = load_tokenizer(opened.path)
    with tokenizing():
        ids = _encode(tokenizer, text, raw)
    if not len(ids):
        raise RecipeError("the prompt has no tokens")
    check_vocabulary(ids, opened)
    room = opened.config.get("max_position_embeddings")
    if isinstance(room, int) and len(ids) + tokens > room:
        raise RecipeError(
            f"{len(ids)} tokens of prompt and --tokens {tokens} are more than the {room} of {name}"
        )
    precision = evaluation_dtype(dtype, opened.dtype, where)
    backend = choose_backend(backend, opened, precision, where, console.note)
    model = load(opened, precision, where, kernels=backend == "kernels")
    ends = _ends(model, tokenizer)
    found: list[int] = []
    shown = ""
    began = time.perf_counter()
    first = began
    decoder = None
    if opened.kv_cache is None or backend == "kernels":
        decoder = _decoder(console, model, len(ids) + tokens, skip_mass)
    elif where.type == "cpu" and cpu.library() is None:
        console.note(
            "the KV cache is unpacked at every step: there was no C++ compiler when llmsqueeze was installed"
        )
    if skip_mass and decoder is None:
        console.note("--skip-mass: nothing is left out where no kernel reads the cache as it is")
    for token in _tokens(model, decoder, ids, tokens):
        if not found:
            first = time.perf_counter()
        if token in ends:
            break
        found.append(token)
        whole = tokenizer.decode(found, skip_special_tokens=True)
        # The last character may be half there.
        if not whole.endswith("\ufffd"):
            console.stream(whole[len(shown) :])
            shown = whole
    whole = tokenizer.decode(found, skip_special_tokens=True)
    console.stream(whole[len(shown) :] + "\n")
    seconds = time.perf_counter() - first
    speed = (len(found) - 1) / seconds if len(found) > 1 and seconds > 0 else None
    if speed:
        console.note(f"{len(found)} tokens, {speed:.1f} a second; prompt {first - began:.2f} s")
    console.result(
        {
            "checkpoint": name, "prompt_tokens": len(ids), "text": whole, "tokens": len(found),
            "tokens_per_second": speed, "dtype": str(precision).removeprefix("torch."),
            "device": str(where),
        }
    )  # fmt: skip


def _encode(tokenizer: Any, text: str, raw: bool) -> Tensor:
    """[tokens] of the prompt, in the model's chat template if it has one and raw does not forbid it."""
    import torch

    if not raw and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer."""
    named = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    flat = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    return {token for token in flat if token is not None}


def _decoder(console: Console, model: Any, length: int, skip_mass: float) -> Decoder | None:
    """Over the cache of the checkpoint's format, if it has one; None where no kernel reads that."""
    from llmsqueeze.runtime.generate import Decoder

    formats = getattr(model, "llmsqueeze_kv_formats", None)
    try:
        return Decoder(model, length, formats=formats, skip_mass=skip_mass)
    except EnvironmentFault as fault:
        if not formats:
            raise
        console.note(f"the KV cache is unpacked at every step: {fault}")
        return None


def _tokens(model: Any, decoder: Decoder | None, ids: Tensor, count: int) -> Iterator[int]:
    """Greedy tokens; without a decoder through the checkpoint's cache, unpacked at every step."""
    import torch

    from llmsqueeze.evaluate import cache_options
    from llmsqueeze.runtime.kv_cache import attached_cache

    if decoder is not None:
        yield from map(int, decoder.generate(ids, count))
        return
    options = cache_options(model, attached_cache(model))
    step = ids[None].to(next(model.parameters()).device)
    for _ in range(count):
        with torch.no_grad():
            step = model(step, **options, logits_to_keep=1).logits[:, -1:].argmax(-1)
        yield int(step)
