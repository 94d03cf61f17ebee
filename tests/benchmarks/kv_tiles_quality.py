"""Perplexity and passkeys of a checkpoint whose KV cache is read from tiles, a token at a time, by device.

    python -m tests.benchmarks.kv_tiles_quality demo-kv --device cpu:float32 --device cuda:float16

All devices decode the same tokens over the same codebooks: a prompt attends to its own keys and values and is
coded then, every later token reads what the tiles hold. The first one given is what the others compare with.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

import llmsqueeze
from llmsqueeze.data import BUNDLED_EVALUATION, bundled_text, evaluation_windows, load_tokenizer
from llmsqueeze.device import exact_matmul
from llmsqueeze.passkey import Prompt, make_prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", action="append", required=True, metavar="DEVICE:DTYPE")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=512, help="of a passkey's prompt")
    parser.add_argument("--text", type=Path, help="for perplexity; default: the bundled one")
    parser.add_argument("--tokens", type=int, default=512, help="for perplexity")
    parser.add_argument("--unpacked", action="store_true", help="the cache that grows, beside it")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.checkpoint)
    prompts = make_prompts(
        tokenizer, bundled_text(BUNDLED_EVALUATION), length=args.length, count=args.prompts
    )
    text = evaluation_windows(
        str(args.text) if args.text else None, tokenizer, seqlen=args.tokens, windows=1
    ).tokens[0]
    first: tuple[list[list[int]], list[float]] | None = None
    for tiles in [True, False] if args.unpacked else [True]:
        for place in args.device:
            device, _, dtype = place.partition(":")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                args.checkpoint, dtype=getattr(torch, dtype), device_map=device
            ).eval()
            with torch.inference_mode(), exact_matmul():
                said = [answer(model, prompt, tiles) for prompt in prompts]
                lost = losses(model, text, tiles)
            found = [
                s == p.tokens[-p.answer :].tolist() for s, p in zip(said, prompts, strict=True)
            ]
            first = first or (said, lost)
            alike = sum(a == b for a, b in zip(said, first[0], strict=True))
            apart = max(abs(a - b) for a, b in zip(lost, first[1], strict=True))
            print(
                f"{place}, {'tiles' if tiles else 'unpacked'}: {sum(found)} of {len(found)} keys found "
                f"{''.join('x' if f else '.' for f in found)}, {alike} answers as the first; perplexity "
                f"{math.exp(sum(lost) / len(lost)):.4f}, a token's loss up to {apart:.4f} from the first's",
                flush=True,
            )
    return 0


def answer(model: torch.nn.Module, prompt: Prompt, tiles: bool) -> list[int]:
    """What is decoded after the question, as many tokens as the answer has."""
    ids = prompt.tokens.to(next(model.parameters()).device)
    cache = llmsqueeze.kv_cache(model, tokens=ids.numel() if tiles else None)
    asked = ids[: -prompt.answer]
    model(asked[None, :-1], past_key_values=cache, use_cache=True)
    token, said = asked[-1:], []
    for _ in range(prompt.answer):
        logits = model(token[None], past_key_values=cache, use_cache=True).logits[0, -1]
        token = logits.argmax().reshape(1)
        said.append(int(token))
    return said


def losses(model: torch.nn.Module, text: Tensor, tiles: bool) -> list[float]:
    """Of every token but the first, one after another."""
    ids = text.to(next(model.parameters()).device)
    cache = llmsqueeze.kv_cache(model, tokens=ids.numel() if tiles else None)
    found = []
    for at in range(ids.numel() - 1):
        logits = model(ids[None, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        found.append(float(-logits.float().log_softmax(-1)[ids[at + 1]]))
    return found


if __name__ == "__main__":
    sys.exit(main())
