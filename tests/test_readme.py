"""Every command that README shows is run, on a tiny checkpoint and in README's order."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze import data

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# What stands for a model in README.
MODELS = {"CHECKPOINT", "demo"}
# Options whose values are for real models, and what a tiny one takes.
SMALLER = {"--seqlen": "24", "--windows": "4", "--samples": "4"}
CALIBRATING = ("prune", "sparsify", "quantize-kv")
# Exit code 1 is a gate's, which a random model need not pass.
GATES = {"--fail-if", "--min-recovery", "--min-speedup", "--max-size", "--target-ppl-ratio"}

pytestmark = pytest.mark.filterwarnings("ignore")


def commands() -> list[str]:
    """The lines of shell blocks that start with our name, and those that a longer line chains."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    parts = [part.strip() for block in blocks for line in block.splitlines()
             for part in re.sub(r"\s{2,}# .*", "", line).split("&&")]  # fmt: skip
    return [part for part in parts if part.startswith("llmsqueeze ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that commands are given."""
    monkeypatch.chdir(tmp_path)
    # Under a tokenizer of bytes the bundled texts are a million tokens, and cut up by every command anew.
    whole = data.bundled_text
    monkeypatch.setattr(data, "bundled_text", lambda name: whole(name)[:50_000])
    (recipe,) = re.findall(r"^```yaml\n(prune:.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "held-out.txt").write_text(
        " ".join(f"{i} times {i} is {i * i}." for i in range(400))
    )
    items = [{"query": f"{i} + {i} =", "choices": [f" {2 * i}", " 1"], "gold": 0} for i in range(8)]
    for name in ("hellaswag", "piqa", "mine"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "my.yaml").write_text(
        f"task: my\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/mine.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nfewshot_split: test\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


def few(step: str) -> list[str]:
    """Calibration tokens of a step of compress."""
    name = f"{step}.calibration"
    return ["--set", f"{name}.samples=4", "--set", f"{name}.seqlen=24"]


def adapted(words: list[str], model: Path) -> list[str]:
    """The same command for a tiny model; names of hub tasks stand for files."""
    words = [str(model) if word in MODELS else word for word in words]
    words = ["hellaswag.jsonl,piqa.jsonl" if word == "hellaswag,piqa" else word for word in words]
    for option, value in SMALLER.items():
        if option in words:
            words[words.index(option) + 1] = value
    if words[0] == "eval" and "--seqlen" not in words:
        words += ["--seqlen", "200" if "--passkey" in words else "24"]
    if words[0] == "eval" and "--windows" not in words:
        words += ["--windows", "4"]
    if words[0] in CALIBRATING and "--samples" not in words:
        words += ["--samples", "4", "--seqlen", "24"]
    if words[0] == "compress":  # of a manifest's steps it says the same itself
        steps = {"recipe.yaml": CALIBRATING, "fastest": CALIBRATING[1:]}
        calibrated = [step for name, found in steps.items() if name in words for step in found]
        words += [word for step in calibrated for word in few(step)]
    if words[0] in (*CALIBRATING, "eval", "run", "compress"):
        words += ["--device", "cpu"]
    out = words[words.index("-o") + 1] if "-o" in words else ""
    return [*words, "--overwrite"] if out and Path(out).exists() else words


def test_readme_shows_every_command() -> None:
    from llmsqueeze.cli import cli

    shown = {shlex.split(command)[1] for command in commands()}
    assert set(cli.commands) - shown <= {"doctor"}  # which is in the text


def test_the_commands_run(cli: Callable[..., Any], tiny: Callable[..., Path], folder: Path) -> None:
    model = tiny(max_position_embeddings=512)
    done = []
    for command in commands():
        words = shlex.split(command)[1:]
        target = None
        if ">" in words:
            target = words[words.index(">") + 1]
            words = words[: words.index(">")]
        if "demo-24" in words:  # pruned before the part that README shows
            words[words.index("demo-24")] = "OUT"
        words = adapted(words, model)
        if words in done:  # of two models
            continue
        done.append(words)
        result = cli(*words)
        allowed = {0, 1} if GATES & set(words) else {0}
        if words[:2] == ["bench", "kernels"] and not torch.cuda.is_available():
            allowed = {4}
        assert result.exit_code in allowed, f"{command}\n{result.stderr}"
        if target or (words[0] == "eval" and "--json" in words):
            (folder / (target or "eval.json")).write_text(result.stdout)
