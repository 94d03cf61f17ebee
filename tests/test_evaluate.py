"""Perplexity against the definition written out with transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CalibrationError
from llmsqueeze.evaluate import LOSS_CHUNK, perplexity
from llmsqueeze.runtime import load
from tests.conftest import tiny_model


@pytest.mark.parametrize("seqlen", [2, 7, 60])
def test_token_ppl_is_its_definition(seqlen: int) -> None:
    model = tiny_model(max_position_embeddings=256)
    windows = torch.randint(3, 160, (6, seqlen), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # transformers shifts the labels itself: the mean over seqlen-1 predictions.
        losses = [float(model(w[None], labels=w[None]).loss) for w in windows]
    mine = perplexity(model, windows)
    assert mine.token_ppl == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)
    assert (mine.windows, mine.seqlen, mine.tokens) == (6, seqlen, 6 * (seqlen - 1))


def test_windows_longer_than_a_loss_chunk() -> None:
    model = tiny_model(max_position_embeddings=256)
    length = 2 * LOSS_CHUNK + 5
    windows = torch.randint(3, 160, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = float(torch.stack([model(w[None], labels=w[None]).loss for w in windows]).mean())
    assert perplexity(model, windows).token_ppl == pytest.approx(math.exp(expected), rel=1e-5)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model()
    model.get_output_embeddings().weight.data.zero_()
    windows = torch.randint(3, 160, (3, 20))
    assert perplexity(model, windows).token_ppl == pytest.approx(160, rel=1e-6)


def test_non_finite_loss_is_an_error() -> None:
    model = tiny_model()
    model.get_output_embeddings().weight.data[5, 5] = float("nan")
    with pytest.raises(CalibrationError, match="window 0"):
        perplexity(model, torch.randint(3, 160, (3, 20)))


def test_load_gives_the_dtype_asked_for(tiny: Any) -> None:
    checkpoint = Checkpoint(tiny())
    model = load(checkpoint, torch.float32, torch.device("cpu"))
    stored = checkpoint.read(["model.layers.2.mlp.down_proj.weight"])
    weight = model.model.layers[2].mlp.down_proj.weight
    assert torch.equal(weight, next(iter(stored.values())).float())


def test_different_tokenizers_are_not_compared(cli: Any, tiny: Any, text_file: Path) -> None:
    other = tiny("llama", vocab_size=170)
    result = cli("eval", tiny(), "--against", other, "--text", text_file, "-q", "--device", "cpu")
    assert result.exit_code == 2
    assert "vocabular" in result.stderr
