"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.numerics.histogram import MagnitudeHistogram
from llmsqueeze.numerics.masks import keep_highest, keep_nm, zero_removed
from llmsqueeze.numerics.packing import pack_bitmask, unpack_bitmask
from llmsqueeze.ops import gate
from tests.conftest import TINY, load_dense

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
    model = load_dense(out, dtype=dtype, **options)
    checkpoint = Checkpoint(out)
    for name, stored in checkpoint.read(checkpoint.sources).items():
        placed = model.get_parameter(name)
        assert placed.is_cuda
        assert torch.equal(placed.cpu(), stored.to(dtype)), name


def test_a_numbered_device_in_a_new_process(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    """Nothing has woken it there."""
    calib = ["--calib", text_file, "--samples", 2, "--seqlen", 24]
    for command in (["prune", "--method", "wanda"], ["sparsify"], ["quantize-kv", "--bits", 4]):
        args = [command[0], tiny("llama"), "-o", tmp_path / command[0], *command[1:], *calib]
        asked = [sys.executable, "-m", "llmsqueeze", *map(str, args), "--device", "cuda:0", "-q"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


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


def _pattern(name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(rows, columns, device="cuda")
    if name == "2:4":
        order = torch.rand(rows, columns // 4, 4, device="cuda").argsort(-1)
        keep = (order < 2).flatten(1)
    elif name == "tail":  # zeros at the end of every row
        keep = torch.rand(rows, columns, device="cuda") > 0.5
        keep[:, columns // 2 :] = False
    elif name == "ragged":  # as SparseGPT leaves them: rows of every length
        keep = torch.rand(rows, columns, device="cuda") > torch.rand(rows, 1, device="cuda")
    else:
        kept = weight.abs().topk(round(columns * (1 - float(name))), dim=1).indices
        keep = torch.zeros_like(weight).scatter_(1, kept, 1).bool()
    return (weight * keep).to(dtype)


def _off(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def _swiglu(y: torch.Tensor) -> torch.Tensor:
    """In fp64: rows of a gate and of an up projection in turns, 8 and 8."""
    gate_, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (gate_ / (1 + (-gate_).exp()) * up).flatten(-2)


# What one rounding changes a value by at most; sixteen values may all be among the worst.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7", "ragged", "tail"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(16, 256), (40, 260), (576, 1536), (192, 576), (9000, 512), (256, 14336), (4304, 4096)],
)
def test_kernels_find_the_product(
    pattern: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    from llmsqueeze.runtime.packed import GapLinear, Sparse24Linear

    weight = _pattern(pattern, rows, columns, dtype)
    for bias in (None, torch.randn(rows, device="cuda").to(dtype)):
        linear = (Sparse24Linear if pattern == "2:4" else GapLinear)(weight, bias)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 65, 200):
            x = torch.randn(tokens, columns, device="cuda").to(dtype)
            expected = x.double() @ weight.double().t()
            expected = expected if bias is None else expected + bias.double()
            y = linear(x)
            assert _off(y, expected) < ROUNDING[dtype], tokens
            assert torch.equal(y, linear(x))
            residual = torch.randn(tokens, rows, device="cuda").to(dtype)
            # Bias and residual are rounded to one addend first.
            limit = ROUNDING[dtype] * (1 if bias is None else 1.25)
            assert _off(linear(x, residual), expected + residual.double()) < limit, tokens
    if rows % 16 == 0:
        paired = (Sparse24Linear if pattern == "2:4" else GapLinear)(weight, bias, glu=True)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 65):
            x = (torch.randn(tokens, columns, device="cuda") / columns**0.5).to(dtype)
            expected = _swiglu(x.double() @ weight.double().t() + bias.double())
            # Beyond some tokens the products are rounded before they meet.
            assert _off(paired(x), expected) < 2 * ROUNDING[dtype], tokens


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 255), (41, 264), (9000, 512), (20_000, 576), (4096, 14336)]
)
def test_gated_kernels_find_the_product(rows: int, columns: int, dtype: torch.dtype) -> None:
    from llmsqueeze.ops import input_major

    weight = input_major(torch.randn(rows, columns, device="cuda").to(dtype))
    bias = torch.randn(rows, device="cuda").to(dtype)
    for tokens in (1, 2):
        x = (torch.randn(tokens, columns, device="cuda") / columns**0.5).to(dtype)
        threshold = torch.rand(columns, device="cuda") * 1.5 / columns**0.5
        threshold[0], threshold[1] = -1, float("inf")
        kept = x.double() * (x.float().abs() > threshold)
        y = torch.ops.llmsqueeze.gated_linear(x, threshold, weight, bias, None, None)
        expected = kept @ weight.double().t() + bias.double()
        assert _off(y, expected) < ROUNDING[dtype]
        if rows % 16 == 0:
            operator = torch.ops.llmsqueeze.gated_linear
            y = operator(x, threshold, weight, bias, None, None, glu=True)
            assert _off(y, _swiglu(expected)) < 2 * ROUNDING[dtype]
            y = operator(x, threshold, weight, bias, None, None)
        assert torch.equal(
            y, torch.ops.llmsqueeze.gated_linear(x, threshold, weight, bias, None, None)
        )
        residual = torch.randn(tokens, rows, device="cuda").to(dtype)
        y = torch.ops.llmsqueeze.gated_linear(x, threshold, weight, residual, None, None)
        expected = kept @ weight.double().t() + residual.double()
        assert _off(y, expected) < ROUNDING[dtype]
        none = torch.full((columns,), float("inf"), device="cuda")
        y = torch.ops.llmsqueeze.gated_linear(x, none, weight, bias, None, None)
        assert torch.equal(y, bias.expand_as(y))
        x[:, 3] = float("nan")
        y = torch.ops.llmsqueeze.gated_linear(x, none, weight, bias, None, None)
        assert bool(y.isnan().all())  # it shows, whatever the threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 256), (576, 576), (192, 577), (40, 264), (256, 14336), (20000, 512)]
)
def test_kernels_behind_gates_read_packed_weights(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    from llmsqueeze.numerics import int8, outputs24
    from llmsqueeze.numerics.masks import keep_nm_out
    from llmsqueeze.ops import input_major, round_down

    operators = torch.ops.llmsqueeze
    weight = torch.randn(rows, columns, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype)
    codes, largest = int8.encode(weight)
    codes, scale = input_major(codes), int8.scales(largest)
    exact = codes.double() * scale.double()[:, None]
    each, paired = torch.rand(columns, device="cuda") * 1.5 / columns**0.5, rows % 16 == 0
    for threshold in (each, round_down(each, dtype), each[:1]):
        for tokens in (1, 2):
            x = (torch.randn(tokens, columns, device="cuda") / columns**0.5).to(dtype)
            kept = x.double() * (x.float().abs() > threshold)
            y = operators.gated_int8_linear(x, threshold, codes, scale, bias, None, None)
            expected = kept @ exact.t() + bias.double()
            assert _off(y, expected) < ROUNDING[dtype]
            if paired:
                y = operators.gated_int8_linear(
                    x, threshold, codes, scale, bias, None, None, glu=True
                )
                assert _off(y, _swiglu(expected)) < 2 * ROUNDING[dtype]
            for budget in (0.0, 0.02):
                halved = weight * keep_nm_out(weight.float().abs(), 2, 4, budget)
                packed = outputs24.pack(halved)
                assert torch.equal(outputs24.unpack(packed, rows, columns), halved)
                fields = packed.values, packed.keep, packed.index
                y = operators.gated_24_linear(x, threshold, *fields, bias, None, None, rows)
                expected = kept @ halved.double().t() + bias.double()
                assert _off(y, expected) < ROUNDING[dtype]
                if paired:
                    y = operators.gated_24_linear(
                        x, threshold, *fields, bias, None, None, rows, glu=True
                    )
                    assert _off(y, _swiglu(expected)) < 2 * ROUNDING[dtype]
    for tokens in (1, 2):
        x = (torch.randn(tokens, columns, device="cuda") / columns**0.5).to(dtype)
        y = operators.int8_linear(x, codes, scale, bias)
        expected = x.double() @ exact.t() + bias.double()
        assert _off(y, expected) < ROUNDING[dtype]
        if paired:
            y = operators.int8_linear(x, codes, scale, bias, glu=True)
            assert _off(y, _swiglu(expected)) < 2 * ROUNDING[dtype]
    # Many tokens are multiplied by cuBLAS, whose rounding is its own: ones alone show the expanded weights.
    for start in range(0, columns, 600):
        x = torch.zeros(min(600, columns - start), columns, device="cuda", dtype=dtype)
        x[:, start:].fill_diagonal_(1)
        found = operators.outputs24_linear(x, *fields, None, 5, rows)
        assert torch.equal(found, halved[5:, start : start + 600].t())
        if len(x) > 2:
            found = operators.int8_linear(x, codes, scale, None)
            assert torch.equal(found, int8.round_weight(weight)[:, start : start + 600].t())


@pytest.mark.parametrize("kind", ["2:4", "tiles", "gaps", "sorted gaps", "int8", "2:4-out"])
def test_kernels_expand_by_panels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, sparse24
    from llmsqueeze.numerics.masks import keep_nm, keep_nm_out, keep_tiles
    from llmsqueeze.ops import input_major, operands

    rows, columns = 208, 512
    monkeypatch.setattr(operands, "PANEL", 64 * 2 * columns)
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    bias, scores = torch.randn(rows, device="cuda").bfloat16(), weight.float().abs()
    operators = torch.ops.llmsqueeze
    if kind == "2:4":
        weight = weight * keep_nm(scores, 2, 4)
        arguments = operators.sparse24_linear, (sparse24.pack(weight),), (rows,)
    elif kind == "tiles":
        weight = weight * keep_tiles(scores, 128, 3)
        arguments = operators.mixed24_linear, tuple(vars(mixed24.pack(weight)).values()), (rows,)
    elif kind == "int8":
        codes, largest = int8.encode(weight)
        weight = int8.round_weight(weight)
        arguments = operators.int8_linear, (input_major(codes), int8.scales(largest)), ()
    elif kind == "2:4-out":
        weight = weight * keep_nm_out(scores, 2, 4, 0.02)
        packed = outputs24.pack(weight)
        fields = packed.values, packed.keep, packed.index
        arguments = operators.outputs24_linear, fields, (0, rows)
    else:
        weight = weight * (scores > (0.7 if kind == "gaps" else 2 * torch.rand(rows, 1).cuda()))
        found = gaps.pack(weight, gaps.Shape(3, 1, 2))
        order = found.order if kind == "sorted gaps" else None
        own = torch.equal(found.order[:rows].cpu(), torch.arange(rows, dtype=torch.int32))
        assert own == (order is None)
        fields = found.stream, found.starts, found.first, order
        arguments = operators.gap_linear, fields, (rows, *found.arguments())
    x = torch.randn(300, columns, device="cuda").bfloat16()
    operator, before, behind = arguments
    product = x.double() @ weight.double().t()
    for added in (bias, torch.randn(300, rows, device="cuda").bfloat16()):
        if added.dim() == 1 or kind != "2:4-out":
            y = operator(x, *before, added, *behind)
            assert _off(y, product + added.double()) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (250, 516), (40, 264), (256, 14336)])
def test_the_kernel_for_tiles_computes_the_same(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    from llmsqueeze.numerics import mixed24
    from llmsqueeze.numerics.masks import keep_tiles

    weight = torch.randn(rows, columns, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype)
    tiles = -(-rows // 128) * -(-columns // 128)
    for dense in (0, tiles // 3, tiles):
        pruned = weight * keep_tiles(weight.float().abs(), 128, dense)
        pruned[:16, 128:256] = 0
        fields = vars(mixed24.pack(pruned)).values()
        for tokens in (1, 2, 4, 5, 8, 16, 33, 64):
            x = (torch.randn(tokens, columns, device="cuda") / columns**0.5).to(dtype)
            y = torch.ops.llmsqueeze.mixed24_linear(x, *fields, bias, rows)
            expected = x.double() @ pruned.double().t() + bias.double()
            assert _off(y, expected) < ROUNDING[dtype], tokens
            residual = torch.randn(tokens, rows, device="cuda").to(dtype)
            y = torch.ops.llmsqueeze.mixed24_linear(x, *fields, residual, rows)
            other = x.double() @ pruned.double().t() + residual.double()
            assert _off(y, other) < ROUNDING[dtype], tokens
            if rows % 16 == 0:
                y = torch.ops.llmsqueeze.mixed24_linear(x, *fields, bias, rows, glu=True)
                assert _off(y, _swiglu(expected)) < 2 * ROUNDING[dtype], tokens
        x = torch.eye(columns, device="cuda", dtype=dtype)
        y = torch.ops.llmsqueeze.mixed24_linear(x, *fields, None, rows)
        assert torch.equal(y, pruned.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "width", "length"),
    [
        (1, 32, 8, 128, 1024), (1, 9, 3, 64, 161), (2, 8, 1, 128, 64), (1, 4, 4, 96, 7),
        (3, 4, 1, 256, 700), (1, 7, 1, 80, 5000), (40, 8, 8, 64, 300),
    ],
)  # fmt: skip
def test_the_kernel_attends_as_the_reference(
    batch: int, heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype
) -> None:
    from llmsqueeze.ops import attend, attend_fits

    q = torch.randn(batch, heads, 1, width, device="cuda").to(dtype)
    # As a cache may hold them: part of something longer.
    k, v = torch.randn(2, batch, kv_heads, length + 3, width, device="cuda").to(dtype)[
        ..., :length, :
    ]
    counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device="cuda")
    seen = torch.rand(batch, 1, 1, length, device="cuda") < 0.7
    seen[..., length // 2] = True
    prefix = torch.arange(length, device="cuda") < max(1, length // 5)
    for mask in (None, seen, prefix.expand(batch, 1, 1, length)):
        assert attend_fits(q, k, v, mask)
        y = torch.ops.llmsqueeze.attend(q, k, v, mask, counters, 0.3)
        expected = attend(q.double(), k.double(), v.double(), mask, counters, 0.3)
        assert _off(y, expected) < 3 * ROUNDING[dtype]
        assert not counters.any()
        assert all(
            torch.equal(y, torch.ops.llmsqueeze.attend(q, k, v, mask, counters, 0.3))
            for _ in range(9)
        )
    k[0, 0, length // 2, 0] = torch.nan
    y = torch.ops.llmsqueeze.attend(q, k, v, seen, counters, 0.3)
    assert bool(y[0, 0, : heads // kv_heads].isnan().all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "gpt_neox"])
def test_decoding_attends_by_the_kernel(family: str) -> None:
    from llmsqueeze.runtime.generate import Decoder
    from tests.test_linears import IDS, tiny_model

    model = tiny_model(family).to(torch.bfloat16).cuda()
    ids = IDS[:1].cuda()
    reference = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model(reference).logits[0, -1].float()
    decoder = Decoder(model, 32)
    assert model.config._attn_implementation == "llmsqueeze_attend"
    found = [int(token) for token in decoder.generate(IDS[0], 12)]
    assert found[:4] == reference[0, 6:10].tolist()
    # Whole windows go through transformers' own.
    assert _off(model(reference).logits[0, -1].float(), expected.double()) < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("format", ["int8", "2:4-out", "plain"])
def test_a_model_with_gates_decodes_in_a_graph(format: str) -> None:
    from llmsqueeze.runtime.generate import Decoder
    from llmsqueeze.runtime.linears import use_kernels
    from tests.test_linears import IDS, gated_model, logits, of_format

    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model = of_format(gated_model(), format).cuda()
    one = IDS[:1, :1].cuda()
    inputs = IDS.cuda(), one
    # A rounding more or less, and an input passes a gate or does not: errors are compared, not results.
    exact = [logits(copy.deepcopy(model).float(), ids).double() for ids in inputs]
    reference = [_off(logits(model, ids), e) for ids, e in zip(inputs, exact, strict=True)]
    dense = [int(token) for token in Decoder(model, 32).generate(IDS[0], 12)]
    report = use_kernels(model)
    assert report.formats["gated" if format == "plain" else f"gated {format}"] == 12
    for ids, e, off in zip(inputs, exact, reference, strict=True):
        assert _off(logits(model, ids), e) < 1.5 * off
    plain = [int(token) for token in Decoder(model, 32).generate(IDS[0], 12)]
    compiled = [int(token) for token in Decoder(model, 32, compiled=True).generate(IDS[0], 12)]
    assert plain[0] == dense[0] == compiled[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("kind", ["2:4", "0.5"])
def test_a_model_on_kernels_decodes_in_a_graph(kind: str) -> None:
    from llmsqueeze.runtime.generate import Decoder
    from llmsqueeze.runtime.linears import use_kernels
    from tests.test_linears import IDS, logits, pruned_model

    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model = pruned_model("2:4" if kind == "2:4" else "50 %").cuda()
    expected = logits(model, IDS.cuda())
    dense = [int(token) for token in Decoder(model, 32).generate(IDS[0], 12)]
    report = use_kernels(model)
    assert sum(report.formats.values()) == 21
    assert _off(logits(model, IDS.cuda()), expected.double()) < 0.02
    plain = [int(token) for token in Decoder(model, 32).generate(IDS[0], 12)]
    compiled = [int(token) for token in Decoder(model, 32, compiled=True).generate(IDS[0], 12)]
    own = model.generate(IDS[:1].cuda(), max_new_tokens=12, do_sample=False, eos_token_id=None)[
        0, IDS.shape[1] :
    ].tolist()
    assert plain == own
    # Random weights: near ties may be decided either way, not from the first token on.
    assert plain[0] == dense[0] == compiled[0]


def test_views_and_nothing_at_all() -> None:
    from llmsqueeze.ops import input_major
    from llmsqueeze.runtime.packed import GapLinear, Sparse24Linear

    weight = _pattern("2:4", 48, 256, torch.bfloat16)
    whole, zeros = input_major(weight), torch.zeros(256, device="cuda")
    large = torch.randn(600, device="cuda").bfloat16()
    for call in (
        Sparse24Linear(weight, None),
        GapLinear(weight, None),
        lambda x: torch.ops.llmsqueeze.gated_linear(x, zeros, whole, None, None, None),
    ):
        x = large[3:259][None]  # contiguous, but not where 16 bytes begin
        assert _off(call(x), x.double() @ weight.double().t()) < ROUNDING[torch.bfloat16]
        assert call(x[:0]).shape == (0, 48)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_first_call_within_a_capture_says_so() -> None:
    from llmsqueeze.errors import EnvironmentFault
    from llmsqueeze.ops import cuda
    from llmsqueeze.runtime.packed import Sparse24Linear

    linear = Sparse24Linear(_pattern("2:4", 32, 256, torch.bfloat16), None)
    x = torch.randn(1, 256, device="cuda").bfloat16()
    cuda._kernel.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(EnvironmentFault, match="capture"), torch.cuda.graph(graph):
        linear(x)


def test_kernels_do_not_compute_in_float32() -> None:
    from llmsqueeze.errors import EnvironmentFault
    from llmsqueeze.runtime.packed import Sparse24Linear

    linear = Sparse24Linear(_pattern("2:4", 32, 256, torch.bfloat16), None)
    with pytest.raises(EnvironmentFault, match="float32"):
        linear(torch.randn(1, 256, device="cuda"))


def test_evaluation_runs_on_kernels(cli: Any, tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    made = cli("prune", tiny("llama"), "-o", out, "--method", "magnitude", "--sparsity", 0.5, "-q")
    assert made.exit_code == 0, made.stderr
    found = []
    for backend in ("kernels", "reference"):
        result = cli("eval", out, "--text", text_file, "--seqlen", 32, "--dtype", "bfloat16",
                     "--backend", backend, "-q", "--json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        document = json.loads(result.stdout)
        assert document["backend"] == backend
        found.append(document["token_ppl"])
    assert abs(found[0] / found[1] - 1) < 1e-3
