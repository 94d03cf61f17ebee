"""Passkey retrieval: can a model still find one sentence in a long text? After arXiv 2305.16300, section 4.2.

Perplexity hardly notices when a cache loses what was said a thousand tokens ago; this does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.device import exact_matmul
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluate import cache_options

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Prompt:
    """tokens: [length], the answer at the end; answer: how many tokens it has; depth: of the needle,
    0 at the beginning of the text to 1 right before the question."""

    tokens: Tensor
    answer: int
    depth: float


@dataclass(frozen=True)
class Retrieval:
    """found: for every prompt, whether greedy decoding would have answered exactly; depths: of them."""

    found: list[bool]
    depths: list[float]
    length: int

    @property
    def accuracy(self) -> float:
        return sum(self.found) / len(self.found)

    def describe(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "accuracy": self.accuracy,
            "prompts": len(self.found),
            "length": self.length,
            "by_depth": [
                {"depth": depth, "found": found}
                for depth, found in zip(self.depths, self.found, strict=True)
            ],
        }


def make_prompts(
    tokenizer: Any, haystack: str, *, length: int, count: int, seed: int = 0, bos: bool = False
) -> list[Prompt]:
    """`count` prompts of exactly `length` tokens, keys of five digits, needles at evenly spread depths.

    Every prompt begins elsewhere in the haystack, and goes round at its end. RecipeError when
    `length` leaves no room for a haystack.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    hay = encode(haystack)
    start = [tokenizer.bos_token_id] if bos else []
    generator = random.Random(seed)
    prompts = []
    for index in range(count):
        key = str(generator.randrange(10_000, 100_000))
        needle, question, whole = (
            encode(text) for text in (NEEDLE.format(key=key), QUESTION, f"{QUESTION} {key}")
        )
        # A tokenizer may join the last of the question with the answer: count what differs.
        same = 0
        while same < len(question) and question[same] == whole[same]:
            same += 1
        room = length - len(start) - len(needle) - len(whole)
        if room < 1 or len(hay) < 2:
            raise RecipeError(
                f"{length} tokens are too few for a passkey test; it needs at least "
                f"{length - room + 1} (--seqlen)"
            )
        first = generator.randrange(len(hay))
        text = [hay[(first + i) % len(hay)] for i in range(room)]
        depth = index / max(1, count - 1)
        at = round(depth * room)
        ids = [*start, *text[:at], *needle, *text[at:], *whole]
        prompts.append(Prompt(torch.tensor(ids), len(whole) - same, depth))
    return prompts


@torch.inference_mode()
def retrieve(
    model: torch.nn.Module,
    prompts: list[Prompt],
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
    cache: Callable[[], Any] | None = None,
) -> Retrieval:
    """Answer every prompt. cache: makes the KV cache of one prompt; None for no cache.

    The answer is there already: it is found if every token of it is the likeliest after those before
    it, which is when greedy decoding would have written it.
    """
    device = next(model.parameters()).device
    found = []
    with exact_matmul():
        for index, prompt in enumerate(prompts):
            ids = prompt.tokens[None].to(device)
            options = cache_options(model, cache() if cache else None)
            logits = model(ids, **options).logits[0, -prompt.answer - 1 : -1]
            found.append(bool((logits.argmax(dim=-1) == ids[0, -prompt.answer :]).all()))
            on_prompt(index + 1, len(prompts))
    return Retrieval(found, [p.depth for p in prompts], prompts[0].tokens.numel())
