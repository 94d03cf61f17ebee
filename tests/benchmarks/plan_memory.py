"""What `plan` says that a recipe takes of memory, beside what `compress` then took. On a CPU.

    python -m tests.benchmarks.plan_memory [--model wide ...] [--recipe wanda ...] [demo]

Random models of several shapes are made in a temporary folder, each with a tokenizer of its own. `compress`
runs in a process of its own, whose highest resident memory the system tells. A table in Markdown; exit code 1
if an estimate is off by more than --within.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmsqueeze.data import BUNDLED_CALIBRATION, bundled_text


@dataclass(frozen=True)
class Shape:
    """A model, and what it is calibrated on."""

    type: str
    hidden: int
    inner: int
    heads: int
    groups: int
    blocks: int
    vocab: int
    samples: int
    seqlen: int
    tied: bool = True


MODELS = {
    "small": Shape("llama", 512, 1536, 8, 4, 6, 8192, 64, 256),
    "deep": Shape("llama", 640, 1280, 10, 5, 12, 49152, 16, 512),
    "square": Shape("qwen2", 768, 3072, 12, 12, 4, 32768, 32, 512, tied=False),
    "long": Shape("llama", 1024, 2816, 16, 4, 4, 16384, 32, 1024),
    "wide": Shape("mistral", 1536, 4096, 12, 4, 4, 32768, 8, 1024, tied=False),
}
FEW_STEPS = [
    "prune.config.admm_steps=3",
    "prune.config.admm_ramp=2",
    "prune.refit_config.refit_steps=3",
]
# Fewer steps of the solvers than by default: they take time, and no more memory.
RECIPES: dict[str, list[str]] = {
    "magnitude": ["prune.method=magnitude"],
    "wanda": ["prune.method=wanda"],
    "wanda, order block": ["prune.method=wanda", "prune.order=block"],
    "sparsegpt": ["prune.method=sparsegpt"],
    "sparsegpt, order block": ["prune.method=sparsegpt", "prune.order=block"],
    "default": FEW_STEPS,
    "default, order block": [*FEW_STEPS, "prune.order=block"],
    "sparsify": ["sparsify.sparsity=0.5", "sparsify.greedy_step=0.25"],
    "quantize-kv": ["quantize-kv.bits=3"],
    "prune, sparsify, quantize-kv": [
        *FEW_STEPS, "sparsify.sparsity=0.5", "sparsify.greedy_step=0.25", "quantize-kv.bits=3"
    ],
    "encode": ["encode.to=int8"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=[*MODELS, "demo"])
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--within", type=float, default=0.15, help="relative; for the exit code")
    args = parser.parse_args()
    print("| model | recipe | planned | taken | ratio | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        for name in args.model or [*MODELS, "demo"]:
            source = "demo" if name == "demo" else str(make(MODELS[name], Path(directory) / name))
            for recipe in args.recipe or RECIPES:
                given = settings(name, recipe)
                planned = plan(source, given)
                taken, seconds = compress(source, given, Path(directory) / "out")
                ratio = planned / taken
                worst = max(worst, abs(ratio - 1))
                print(
                    f"| {name} | {recipe} | {planned / 1e6:.0f} MB | {taken / 1e6:.0f} MB "
                    f"| {ratio:.2f} | {seconds:.0f} |",
                    flush=True,
                )
    print(f"\nfurthest off: {worst:.1%}")
    sys.exit(worst > args.within)


def make(shape: Shape, path: Path) -> Path:
    """A random checkpoint in bf16."""
    if path.exists():
        return path
    config = AutoConfig.for_model(
        shape.type, hidden_size=shape.hidden, intermediate_size=shape.inner, vocab_size=shape.vocab,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        num_hidden_layers=shape.blocks, tie_word_embeddings=shape.tied, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    save_tokenizer(shape.vocab, path)
    return path


def save_tokenizer(vocab: int, path: Path) -> None:
    """One of so many tokens, learnt from the calibration texts: how many these are counts as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(map(bundled_text, BUNDLED_CALIBRATION), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def settings(model: str, recipe: str) -> list[str]:
    """Options of plan and compress."""
    shape = MODELS.get(model)
    samples, seqlen = (shape.samples, shape.seqlen) if shape else (16, 512)
    given = list(RECIPES[recipe])
    for command in ("prune", "sparsify", "quantize-kv"):
        if any(setting.startswith(command + ".") for setting in given):
            given += [f"{command}.calibration.samples={samples}",
                      f"{command}.calibration.seqlen={seqlen}"]  # fmt: skip
    return ["--device", "cpu", "--json", "-q", *(p for s in given for p in ("--set", s))]


def plan(source: str, given: list[str]) -> int:
    command = [sys.executable, "-m", "llmsqueeze", "plan", source, *given]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return int(document["peak_rss_bytes"])


def compress(source: str, given: list[str], out: Path) -> tuple[int, float]:
    """Highest resident memory, and seconds. As the command itself says: the system's word for a child counts
    what its parent held when it started it."""
    command = [sys.executable, "-m", "llmsqueeze", "compress", source, "-o", str(out), *given]
    began = time.monotonic()
    done = subprocess.run([*command, "--overwrite"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {done.returncode}")
    return int(json.loads(done.stdout)["peak_rss_bytes"]), time.monotonic() - began


if __name__ == "__main__":
    main()
