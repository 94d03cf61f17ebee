"""Tiny models and checkpoints. Nothing here needs a GPU, a network or files outside the repository."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm looks when it is imported

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """With -n, share the cores among the processes, also among those that tests start."""
    if processes := config.getoption("numprocesses", None):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


# Small but not degenerate: grouped queries, several blocks, widths that no tile divides evenly.
COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "num_hidden_layers": 4, **SLIDING},
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "num_hidden_layers": 4,
        **SLIDING,
    },
    "phi3": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 40, "tie_word_embeddings": True},
    "gpt_neox": {},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def tiny_model(model_type: str = "llama", **changes: Any) -> Any:
    """A random causal language model of one family, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, **{**COMMON, **(TINY | MIXTURES)[model_type], **changes}
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as constants: hide nothing
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: one token per byte, ids 3 and up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # ASCII, and the space in byte-level spelling; more would not fit the tiny vocabulary.
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:156], "Ġ"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a tiny checkpoint; made once per (model_type, dtype, changes). Do not write into it."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Path:
        key = json.dumps([model_type, dtype, changes], sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp(model_type) / "checkpoint"
            save_kwargs = {"max_shard_size": changes.pop("max_shard_size", "5GB")}
            tiny_model(model_type, **changes).to(getattr(torch, dtype)).save_pretrained(
                path, **save_kwargs
            )
            save_tokenizer(path)
            made[key] = path
        return made[key]

    return make


def load_dense(path: Path, **options: Any) -> Any:
    """A checkpoint by transformers, also one of ours with weights as they were before they were packed."""
    from transformers import AutoModelForCausalLM

    from llmsqueeze import LlmsqueezeConfig

    if "quantization_config" in json.loads((path / "config.json").read_text()):
        options["quantization_config"] = LlmsqueezeConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6000 bytes of varied ASCII, one token each under the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"line {i} squares to {i * i};" for i in range(220)))
    return path


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*args: object) -> Result:
        from llmsqueeze.cli import main

        monkeypatch.setattr(sys, "argv", ["llmsqueeze", *(str(arg) for arg in args)])
        capsys.readouterr()  # what came before is not this command's
        with pytest.raises(SystemExit) as done:
            main()
        streams = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return Result(done.value.code, streams.out, streams.err)

    return run


@pytest.fixture
def prune_args(text_file: Path) -> list[object]:
    """Options that make `prune` quick on a tiny checkpoint."""
    return ["--calib", text_file, "--samples", 4, "--seqlen", 24, "--device", "cpu", "-q"]


def compile_whole(model: Any) -> Any:
    """A model as torch.compile understands it, in one graph."""
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    return torch.compile(model, fullgraph=True, backend="aot_eager")
