"""Passkey retrieval: what the prompts are, and that an answer counts exactly when decoding would give it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmsqueeze.errors import RecipeError
from llmsqueeze.passkey import QUESTION, make_prompts, retrieve
from tests.conftest import save_tokenizer, tiny_model

HAYSTACK = "Some words that say nothing of interest; more of them follow. " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_what_they_say(tokenizer: Any, bos: bool) -> None:
    prompts = make_prompts(tokenizer, HAYSTACK, length=300, count=5, bos=bos)
    assert [p.depth for p in prompts] == [0, 0.25, 0.5, 0.75, 1]
    keys = set()
    for prompt in prompts:
        assert prompt.tokens.shape == (300,)
        assert (prompt.tokens[0] == tokenizer.bos_token_id) == bos
        # The tiny tokenizer has no token for a new line.
        text = tokenizer.decode(prompt.tokens[int(bos) :]).replace("<pad>", "\n")
        found = re.findall(r"[1-9]\d{4}", text)
        assert len(found) == 3 and len(set(found)) == 1
        keys.add(found[0])
        assert text.endswith(f"{QUESTION} {found[0]}")
        assert tokenizer.decode(prompt.tokens[-prompt.answer :]).strip() == found[0]
        # The needle stands where its depth says, within the text around it.
        needle = text.index("The pass key is")
        end = text.rindex("The pass key is") - len("\nWhat is the pass key? ")
        room = end - len(
            f"\nThe pass key is {found[0]}. Remember it. {found[0]} is the pass key.\n"
        )
        assert needle - 1 == pytest.approx(prompt.depth * room, abs=2)
    assert len(keys) == 5
    again = make_prompts(tokenizer, HAYSTACK, length=300, count=5, bos=bos)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(prompts, again, strict=True))


def test_no_room_for_a_haystack(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"at least (\d+)") as refused:
        make_prompts(tokenizer, HAYSTACK, length=40, count=2)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    assert len(make_prompts(tokenizer, HAYSTACK, length=least, count=2)) == 2
    with pytest.raises(RecipeError):
        make_prompts(tokenizer, HAYSTACK, length=least - 1, count=2)


class Copier(nn.Module):
    """Predicts what followed the last time that the eight tokens before were seen."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.horizon, self.weight = horizon, nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        row = ids[0].tolist()
        logits = torch.zeros(1, len(row), 160)
        for t in range(8, len(row)):
            for back in range(t - 1, max(7, t - self.horizon), -1):
                if row[back - 8 : back] == row[t - 7 : t + 1]:
                    logits[0, t, row[back]] = 1
                    break
        return type("Output", (), {"logits": logits})


def test_who_sees_far_enough_finds_the_key(tokenizer: Any) -> None:
    prompts = make_prompts(tokenizer, HAYSTACK, length=300, count=6)
    assert retrieve(Copier(1000), prompts).accuracy == 1
    near = retrieve(Copier(150), prompts)
    assert near.found == [False] * 4 + [True] * 2
    assert retrieve(Copier(10), prompts).accuracy == 0
    assert near.describe()["by_depth"][5] == {"depth": 1, "found": True}


def test_found_is_what_greedy_decoding_writes(tokenizer: Any) -> None:
    """A model that answers by chance: its own greedy answer is found, any other is not."""
    model = tiny_model(max_position_embeddings=512)
    (prompt,) = make_prompts(tokenizer, HAYSTACK, length=200, count=1)
    asked = prompt.tokens[: -prompt.answer]
    out = model.generate(
        asked[None], attention_mask=torch.ones_like(asked[None]), do_sample=False,
        max_new_tokens=prompt.answer, eos_token_id=None,
    )  # fmt: skip
    answered = type(prompt)(out[0], prompt.answer, 0.0)
    assert retrieve(model, [answered, prompt]).found == [True, False]
    wrong = out[0].clone()
    wrong[-1] = (wrong[-1] + 1) % 160
    assert retrieve(model, [type(prompt)(wrong, prompt.answer, 0.0)]).found == [False]


def test_eval_reports_it(cli: Any, tiny: Any, text_file: Path) -> None:
    source = tiny(max_position_embeddings=256)
    args = ["eval", source, "--text", text_file, "--windows", 2, "--device", "cpu", "--passkey"]
    result = cli(
        *args, "--seqlen", 200, "--against", source, "--kv-cache", "rotate:2", "--json", "-q"
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    for key in ("passkey", "dense_passkey"):
        assert document[key]["prompts"] == 20 and document[key]["length"] == 200
        assert 0 <= document[key]["accuracy"] <= 1 and len(document[key]["by_depth"]) == 20
    assert "keys found" in cli(*args, "--seqlen", 200).stdout
    result = cli(*args, "--seqlen", 40)
    assert result.exit_code == 2 and "--seqlen" in result.stderr
