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
from llmsqueeze.ops import cpu, packed_append, packed_attention
from llmsqueeze.runtime.tiles import TiledLayer

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


@pytest.fixture
def cached(cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path, text_file: Path,
           request: pytest.FixtureRequest) -> Path:  # fmt: skip
    """Pruned, with heads that kernels attend over, and a quantised KV cache."""
    pruned, out = tmp_path / "wide", tmp_path / "cached"
    source = tiny("llama", head_dim=64)
    options = {
        "rotate": ("--method", "rotate", "--bits", 4),
        "fp8": ("--method", "fp8"),
        "kvquant": ("--method", "kvquant", "--bits", 3, "--calib", text_file, "--samples", 4,
                    "--seqlen", 48),
    }[request.param]  # fmt: skip
    for step in (("prune", source, "-o", pruned, "--method", "magnitude", "-q"),
                 ("quantize-kv", pruned, "-o", out, *options, "-q")):  # fmt: skip
        result = cli(*step)
        assert result.exit_code == 0, result.stderr
    return out


@pytest.mark.parametrize("cached", ["rotate", "fp8", "kvquant"], indirect=True)
def test_a_quantised_cache_beside_a_dense_one(cached: Path) -> None:
    found = {kernels: bench_cpu._Model(cached, PROMPT, torch.float32, kernels)
             for kernels in (True, False)}  # fmt: skip
    assert any(isinstance(layer, TiledLayer) for layer in found[True]._decoder.cache.layers)
    assert not any(isinstance(layer, TiledLayer) for layer in found[False]._decoder.cache.layers)
    assert 0 < found[True].facts.error <= bench_cpu.TOLERANCE
    # Tiles are as many as tokens need, of 64 each; the dense cache is in fp32.
    tokens = len(PROMPT) + bench_cpu.STEPS
    mine, dense = (found[kernels].describe() for kernels in (True, False))
    assert dense.cache == 3 * 2 * 2 * 64 * 4 * tokens
    assert 0 < mine.cache < dense.cache / 3
    assert mine.read - mine.cache < dense.read - dense.cache


@pytest.mark.parametrize("cached", ["rotate"], indirect=True)
def test_a_quantised_cache_from_the_command_line(cli: Callable[..., Any], cached: Path) -> None:
    result = cli("bench", "model", cached, "--prompt", 16, "--device", "cpu", "--json",
                 "--skip-mass", 0.001)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["skip_mass"] == 0.001 and document["formats"] == {"bitmask": 21, "dense": 1}
    assert 0 < document["compressed"]["cache_bytes"] < document["dense"]["cache_bytes"]


@pytest.mark.parametrize("cached", ["rotate"], indirect=True)
@pytest.mark.parametrize("operator", ["kv_append", "kv_attend"])
def test_a_wrong_cache_is_found(
    cached: Path, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are compared with what they should do: change what that is."""
    module = packed_append if operator == "kv_append" else packed_attention
    own = getattr(module, operator)

    def wrong(first: torch.Tensor, *rest: Any) -> Any:
        return own(first * -1, *rest)

    monkeypatch.setattr(module, operator, wrong)
    facts = bench_cpu._Model(cached, PROMPT, torch.float32, True).facts
    assert facts.error > bench_cpu.TOLERANCE and facts.operator == "kv_append, kv_attend"


def test_a_cache_that_no_kernel_reads(
    cli: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "narrow"
    made = cli("quantize-kv", tiny(), "-o", out, "--method", "rotate", "--bits", 4, "-q")
    assert made.exit_code == 0, made.stderr
    with pytest.raises(EnvironmentFault, match="no kernel attends over a cache"):
        bench_cpu._Model(out, PROMPT, torch.float32, True)


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
