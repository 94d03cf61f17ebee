"""`bench model` on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze import bench_cpu
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, EnvironmentFault
from llmsqueeze.ops import cpu

PROMPT = torch.arange(16) + 3


@pytest.fixture
def pruned(cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path) -> Path:
    out = tmp_path / "pruned"
    result = cli("prune", tiny("llama"), "-o", out, "--method", "magnitude", "-q")
    assert result.exit_code == 0, result.stderr
    return out


def test_a_pruned_model_beside_the_dense_one(cli: Callable[..., Any], pruned: Path) -> None:
    result = cli("bench", "model", pruned, "--prompt", 16, "--device", "cpu", "--json", "--fail-if",
                 "speedup < 1e9")  # fmt: skip
    assert result.exit_code == 1, result.stderr
    found = json.loads(result.stdout)
    assert found["dense_dtype"] in ("bfloat16", "float32") and found["dtype"] == "float32"
    assert found["formats"] == {"bitmask": 21, "dense": 1}
    assert found["threads"] == torch.get_num_threads()
    fastest, other = found["dense"], found["slower_dense"]
    assert fastest["ms_per_token"] <= other["ms_per_token"]
    speedup = fastest["ms_per_token"] / found["compressed"]["ms_per_token"]
    assert found["speedup"] == pytest.approx(speedup)
    # Weights in fp32 take twice what they take in 16 bits.
    assert {fastest["weight_bytes"], other["weight_bytes"]} != {fastest["weight_bytes"]}
    for speed in (found["compressed"], fastest, other):
        low, high = speed["range"]
        assert 0 < low <= speed["ms_per_token"] <= high
        # Torch alone takes more than 100 MB.
        assert 1e8 < speed["resident_bytes"] <= speed["peak_resident_bytes"]
    assert found["error"] < 1e-5 and found["logit_error"] < 1e-4
    assert found["same_tokens"] == found["tokens"]
    assert [c["failed"] for c in found["conditions"]] == [True]


def test_gates_read_less(cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path,
                         text_file: Path) -> None:  # fmt: skip
    out = tmp_path / "gated"
    made = cli("sparsify", tiny(), "-o", out, "--sparsity", 0.5, "--calib", text_file, "--samples", 4,
               "--seqlen", 48, "--device", "cpu")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    model = bench_cpu._Model(out, PROMPT, torch.float32, True)
    speed = model.describe()
    assert speed.read - speed.cache < 0.8 * speed.weights


def test_what_it_refuses(
    cli: Callable[..., Any], pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli("bench", "model", pruned, "--device", "cpu", "--compile")
    assert result.exit_code == 2 and "--compile is for GPUs" in result.stderr
    monkeypatch.setattr(cpu, "library", lambda: None)
    result = cli("bench", "model", pruned, "--prompt", 16, "--device", "cpu")
    assert result.exit_code == 4 and "no C++ compiler" in result.stderr


def test_a_wrong_result_stops_it(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "TOLERANCE", 0.0)
    with pytest.raises(EnvironmentFault, match="wrong result on this CPU"):
        bench_cpu.compare(Checkpoint(pruned), PROMPT, torch.float32)


def test_what_fails_in_a_process_fails_here(pruned: Path) -> None:
    checkpoint = Checkpoint(pruned)
    (pruned / "model.safetensors").write_bytes(b"no shard")
    with pytest.raises(CheckpointError):
        bench_cpu.compare(checkpoint, PROMPT, torch.float32)
