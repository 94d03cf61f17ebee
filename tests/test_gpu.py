"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.numerics.histogram import MagnitudeHistogram
from llmsqueeze.numerics.masks import keep_highest, keep_nm, zero_removed
from llmsqueeze.numerics.packing import pack_bitmask, unpack_bitmask
from llmsqueeze.ops import gate
from tests.conftest import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Tiny = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    score = torch.randint(0, 50, (300, 1000)).to(dtype)
    for removed in (0, 1, 500, 999):
        assert torch.equal(keep_highest(score.cuda(), removed).cpu(), keep_highest(score, removed))
    flat = score.reshape(1, -1)
    assert torch.equal(keep_highest(flat.cuda(), 150_000).cpu(), keep_highest(flat, 150_000))
    assert torch.equal(keep_nm(score.cuda(), 2, 4).cpu(), keep_nm(score, 2, 4))
    weight = torch.randn(300, 1000).to(dtype)
    keep = keep_nm(score, 2, 4)
    assert torch.equal(zero_removed(weight.cuda(), keep.cuda()).cpu(), zero_removed(weight, keep))


def test_packing_round_trip() -> None:
    weight = (torch.randn(65, 130) * (torch.rand(65, 130) < 0.5)).bfloat16()
    parts = [part.cuda() for part in pack_bitmask(weight.cuda())]
    assert torch.equal(unpack_bitmask(*parts, 130).cpu(), weight)


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("order", ["group", "block"])
def test_pruning_agrees_with_the_cpu(
    cli: Any, tiny: Tiny, tmp_path: Path, text_file: Path, family: str, method: str, order: str
) -> None:
    common = ["--method", method, "--order", order, "--calib", text_file, "--samples", 6,
              "--seqlen", 24, "--dtype", "float32", "-q", "--json"]  # fmt: skip
    weights = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        result = cli("prune", tiny(family), "-o", out, "--device", device, *common)
        assert result.exit_code == 0, result.stderr
        checkpoint = Checkpoint(out)
        weights.append(checkpoint.read(checkpoint.sources))
    peak = json.loads(result.stdout)["peak_device_bytes"]
    assert peak > 0 or method == "magnitude"
    for name, cpu in weights[0].items():
        differing = ((cpu == 0) != (weights[1][name] == 0)).float().mean()
        assert differing < 0.02, name  # rounding may turn a close decision


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cuda"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_to_the_device(
    cli: Any, tiny: Tiny, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    assert cli("prune", tiny(), "-o", out, "--method", "magnitude", "-q").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, **options)
    checkpoint = Checkpoint(out)
    for name, stored in checkpoint.read(checkpoint.sources).items():
        placed = model.get_parameter(name)
        assert placed.is_cuda
        assert torch.equal(placed.cpu(), stored.to(dtype)), name


def test_eval_on_the_device(cli: Any, tiny: Tiny, text_file: Path) -> None:
    found = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        args = ["--text", text_file, "--seqlen", 32, "--device", device, "--dtype", dtype]
        result = cli("eval", tiny(), *args, "-q", "--json")
        assert result.exit_code == 0, result.stderr
        found[device, dtype] = json.loads(result.stdout)["token_ppl"]
    assert found["cuda", "float32"] == pytest.approx(found["cpu", "float32"], rel=1e-4)
    assert found["cuda", "bfloat16"] == pytest.approx(found["cpu", "float32"], rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    x, threshold = torch.randn(7, 300).to(dtype), torch.randn(300).abs()
    assert torch.equal(gate(x.cuda(), threshold.cuda()).cpu(), gate(x, threshold))
    histograms = [MagnitudeHistogram(torch.device(device)) for device in ("cpu", "cuda")]
    for histogram in histograms:
        histogram.update(x.float().abs().to(histogram.counts.device))
    assert torch.equal(histograms[0].counts, histograms[1].counts.cpu())


@pytest.mark.parametrize("method", ["teal", "wina", "chess", "rsparse"])
@pytest.mark.parametrize("options", [[], ["--no-sequential"]])
def test_sparsify_agrees_with_the_cpu(
    cli: Any, tiny: Tiny, tmp_path: Path, text_file: Path, method: str, options: list[str]
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        result = cli("sparsify", tiny(), "-o", out, "--method", method, "--calib", text_file,
                     "--samples", 6, "--seqlen", 48, "--dtype", "float32", "--device", device,
                     "--json", *options)  # fmt: skip
        assert result.exit_code == 0, result.stderr
        found[device] = json.loads(result.stdout)["gates"]
        measured = cli("eval", out, "--text", text_file, "--seqlen", 48, "--device", device)
        assert measured.exit_code == 0, measured.stderr
    for name, gate_ in found["cpu"].items():
        assert found["cuda"][name]["threshold"] == pytest.approx(gate_["threshold"], rel=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox", "opt"])
def test_a_quantised_cache_is_nearly_that_of_the_cpu(
    tiny: Tiny, text_file: Path, tmp_path: Path, family: str
) -> None:
    from llmsqueeze import kv_cache
    from llmsqueeze.evaluate import cache_options
    from llmsqueeze.kv_recipe import KvRecipe
    from llmsqueeze.quantize_kv import quantize_kv
    from llmsqueeze.runtime import load

    source = Checkpoint(tiny(family, "float32"))
    asked = {"bits": 3, "outliers": 0.1, "dtype": "float32",
             "calibration": {"text": str(text_file), "samples": 6, "seqlen": 40}}  # fmt: skip
    ids = torch.randint(3, 150, (2, 30), generator=torch.Generator().manual_seed(0))
    books, logits = [], []
    for name in ("cpu", "cuda"):
        quantize_kv(source, family, tmp_path / name, KvRecipe.from_dict(asked), torch.device(name))
        books.append(Checkpoint(tmp_path / name).read_kv_cache())
        # The CPU's calibration on both: what they compute with it is to be the same.
        model = load(Checkpoint(tmp_path / "cpu"), torch.float32, torch.device(name))
        with torch.no_grad():
            cache = kv_cache(model)
            first = model(ids[:, :20].to(name), **cache_options(model, cache)).logits
            rest = model(ids[:, 20:].to(name), **cache_options(model, cache)).logits
        logits.append(torch.cat([first, rest], dim=1).cpu())
    for part, tensor in books[0].items():
        if part.endswith(("key_offset", "key_scale")):
            assert torch.allclose(tensor.float(), books[1][part].float(), rtol=2e-2, atol=2e-3)
    # A code at a border may fall to either side.
    close = (logits[0] - logits[1]).abs().amax(dim=-1) < 1e-3
    assert float(close.float().mean()) > 0.8
    assert torch.allclose(logits[0], logits[1], atol=0.3)
