"""Models whose linears lie in the layout of kernels, on operators' references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze import ops
from llmsqueeze.bench_model import operator_error
from llmsqueeze.errors import EnvironmentFault, RecipeError
from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, sparse24
from llmsqueeze.numerics.masks import keep_nm_out, keep_tiles
from llmsqueeze.ops import cpu, gated_linear, input_major, is_input_major
from llmsqueeze.policy import Policy
from llmsqueeze.runtime.gates import GateParts, gating_of, install, remove
from llmsqueeze.runtime.generate import Decoder
from llmsqueeze.runtime.linears import (
    FusedPart,
    GatedPart,
    _check,
    _packed_kind,
    pack_linears,
    use_kernels,
)
from llmsqueeze.runtime.packed import (
    GapLinear,
    Gated24Product,
    GatedInt8Product,
    GatedProduct,
    Int8Linear,
    Mixed24Linear,
    Sparse24Linear,
    _compact,
)
from tests.conftest import TINY, compile_whole, tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(5, 17).reshape(2, 6)


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators that have a kernel for a CPU run their reference too: gates hang on every bit of 16."""
    monkeypatch.setattr(cpu, "library", lambda: None)


def pruned_model(pattern: str, family: str = "llama") -> Any:
    model = tiny_model(family).to(torch.bfloat16)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name and "embed_out" not in name:
                magnitude = module.weight.float().abs()
                if pattern == "tiles":
                    keep = keep_tiles(magnitude, 16, 1).float()
                elif pattern == "2:4":
                    groups = magnitude.unflatten(1, (-1, 4))
                    keep = (
                        torch.zeros_like(groups).scatter_(2, groups.topk(2).indices, 1).flatten(1)
                    )
                else:
                    keep = (magnitude >= magnitude.median(1, keepdim=True).values).float()
                module.weight.mul_(keep)
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "opt", "gpt_neox"])
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("2:4", Sparse24Linear), ("50 %", GapLinear), ("tiles", Mixed24Linear)],
)
def test_a_packed_model_computes_the_same(family: str, pattern: str, kind: type) -> None:
    model = pruned_model(pattern, family)
    expected = logits(model)
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    report = pack_linears(model, CPU)
    assert any(isinstance(m, kind) for m in model.modules())
    left = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert left == [model.get_output_embeddings()]
    assert sum(report.formats.values()) == linears - 1
    found = logits(model)
    # One product for several linears may round its sums in another order, and rounds less within an MLP.
    assert float((found - expected).norm() / expected.norm()) < 0.01
    chosen = expected.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
    assert float((expected.amax(-1) - chosen).max()) < 0.01 * float(expected.abs().max())


def test_linears_of_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_model("2:4")
    pack_linears(model, CPU)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, FusedPart)
    assert attention.q_proj.fused is attention.k_proj.fused is attention.v_proj.fused
    product = attention.q_proj.fused.product
    calls: list[Tensor] = []
    product.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    logits(model)
    logits(model)
    assert len(calls) == 2
    assert attention.q_proj.fused._last is None  # nothing is kept alive


def test_weights_with_few_zeros_stay_dense() -> None:
    model = tiny_model().to(torch.bfloat16)
    expected = logits(model)
    assert not pack_linears(model, CPU).formats
    assert torch.equal(logits(model), expected)


def test_bytes_are_counted() -> None:
    model = pruned_model("2:4", "gpt_neox")
    before = sum(
        m.weight.numel() * 2
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    )
    report = pack_linears(model, CPU)
    assert report.bytes_before == before
    held = [m for m in model.modules() if isinstance(m, Sparse24Linear)]
    buffers = [b for m in held for b in m.buffers() if b is not None]
    assert report.bytes_after == sum(b.numel() * b.element_size() for b in buffers)


def gated_model(rank: int = 0) -> Any:
    model = tiny_model().to(torch.bfloat16)
    parts = {}
    generator = torch.Generator().manual_seed(3)
    for index, block in enumerate(model.model.layers):
        for owner, members in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("down_proj",)),
        ):
            names = tuple(f"model.layers.{index}.{owner}.{m}" for m in members)
            linears = [model.get_submodule(name) for name in names]
            width = linears[0].in_features
            down = torch.randn(rank, width, generator=generator) * 0.1 if rank else None
            ups = None
            if rank:
                ups = {
                    name: torch.randn(linear.out_features, rank, generator=generator)
                    for name, linear in zip(names, linears, strict=True)
                }
            threshold = torch.full((width,), 0.4)
            parts[names[0]] = GateParts("input", names[0], names, threshold, down, ups)
        del block
    install(model, parts, Policy.parse("dense"), model.model.layers)
    return model


@pytest.mark.parametrize("rank", [0, 4])
def test_a_packed_model_with_gates_computes_the_same(rank: int) -> None:
    model = gated_model(rank)
    one = IDS[:1, :1]
    expected = [logits(model), logits(model, one)]
    report = pack_linears(model, CPU)
    assert report.formats == {"gated": 12}
    assert isinstance(model.model.layers[0].self_attn.k_proj, GatedPart)
    for found, reference in zip([logits(model), logits(model, one)], expected, strict=True):
        assert float((found - reference).norm() / reference.norm()) < 0.01
    gating = gating_of(model)
    assert gating
    gating.count()
    logits(model, one)
    assert 0.05 < sum(gating.sparsity().values()) / len(gating.sparsity()) < 0.95


def of_format(model: Any, format: str) -> Any:
    """The same model with weights that `format` gives back."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                weight = module.weight
                if format == "int8":
                    weight.copy_(int8.round_weight(weight))
                elif format == "2:4-out":
                    weight.mul_(keep_nm_out(weight.float().abs(), 2, 4, 0.05))
    return model


@pytest.mark.parametrize(
    ("format", "kind"), [("int8", GatedInt8Product), ("2:4-out", Gated24Product)]
)
@pytest.mark.parametrize("rank", [0, 4])
def test_gates_before_packed_weights_compute_the_same(format: str, kind: type, rank: int) -> None:
    model = of_format(gated_model(rank), format)
    inputs = [IDS, IDS[:1, :1]]
    expected = [logits(model, ids) for ids in inputs]
    report = pack_linears(model, CPU)
    assert report.formats[f"gated {format}"] == 12
    assert format != "int8" or report.bytes_after < 0.8 * report.bytes_before  # 2:4 pads rows to 16
    products = [m for m in model.modules() if isinstance(m, GatedProduct)]
    assert {type(m) for m in products} == {kind}
    assert all(m.limit.numel() == 1 for m in products)  # equal thresholds are kept once
    for ids, reference in zip(inputs, expected, strict=True):
        assert float((logits(model, ids) - reference).norm() / reference.norm()) < 0.01


def test_thresholds_are_kept_in_the_dtype_of_weights() -> None:
    threshold = torch.tensor([0.1, 0.2, -1.0, torch.inf])
    compact = _compact(threshold, torch.bfloat16)
    assert compact.dtype == torch.bfloat16
    x = torch.tensor([0.1, 0.2, 0.0, 3.0]).bfloat16().repeat(200, 1)
    x += torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.01
    gate = torch.ops.llmsqueeze.gate
    assert torch.equal(gate(x, compact), gate(x, threshold))
    assert torch.equal(
        gate(x, _compact(threshold[:1].expand(4), torch.bfloat16)), gate(x, threshold[:1])
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_weights_of_eight_bits_need_no_gate(family: str) -> None:
    model = of_format(tiny_model(family).to(torch.bfloat16), "int8")
    expected = logits(model)
    report = pack_linears(model, CPU)
    assert set(report.formats) == {"int8"}
    assert any(isinstance(m, Int8Linear) for m in model.modules())
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.01


def test_pruned_weights_of_eight_bits_take_the_faster_kernel() -> None:
    weight = torch.randn(64, 64)
    for sparsity, kind in ((0.45, Int8Linear), (0.7, GapLinear)):
        kept = (torch.rand(64, 64) >= sparsity).float()
        assert _packed_kind(int8.round_weight((weight * kept).bfloat16())) is kind
    assert _packed_kind(weight.bfloat16()) is None


@pytest.mark.parametrize("wrong", [None, "scaled", "nan"])
def test_operators_are_compared_on_what_they_meet(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_format(gated_model(), "int8")
    pack_linears(model, CPU)
    reference = ops.gated_int8_linear
    met = []

    def changed(*given: Any) -> Tensor:
        met.append(given[0].shape)
        return reference(*given) * {None: 1, "scaled": 1.5, "nan": torch.nan}[wrong]

    monkeypatch.setattr(ops, "gated_int8_linear", changed)
    error, operator = operator_error(model, IDS[0])
    assert set(met) == {(1, 1, 40), (1, 1, 72)}  # one token, whatever the prompt
    if wrong is None:
        assert error == 0
    else:
        assert operator == "gated_int8_linear"
        assert not error <= 0.3


@pytest.mark.parametrize(
    ("pattern", "operator"), [("2:4", "sparse24_linear"), ("50 %", "gap_linear")]
)
def test_every_operator_is_compared(
    pattern: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned_model(pattern)
    pack_linears(model, CPU)
    reference = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *given: reference(*given) * 1.5)
    error, found = operator_error(model, IDS[0])
    assert found == operator and error > 0.3


def test_gates_can_be_taken_out() -> None:
    model = gated_model()
    plain = logits(tiny_model().to(torch.bfloat16), IDS[:1, :1])
    assert not torch.equal(logits(model, IDS[:1, :1]), plain)
    remove(model)
    assert gating_of(model) is None
    assert torch.equal(logits(model, IDS[:1, :1]), plain)


def test_input_major_is_the_same_matrix() -> None:
    weight = torch.randn(13, 24).bfloat16()
    stored = input_major(weight)
    assert torch.equal(stored, weight)
    assert stored.stride() == (1, 16)
    assert is_input_major(stored)
    assert not is_input_major(weight)
    x, threshold = torch.randn(2, 24).bfloat16(), torch.rand(24)
    expected = gated_linear(x, threshold, weight, None, None, None)
    assert torch.allclose(gated_linear(x, threshold, stored, None, None, None), expected, atol=0.05)


def test_a_converted_model_is_not_saved(tmp_path: Path) -> None:
    model = pruned_model("2:4")
    pack_linears(model, CPU)
    with pytest.raises(RecipeError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "out")


def test_what_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(EnvironmentFault, match="no C\\+\\+ compiler"):
        use_kernels(pruned_model("2:4"))
    with pytest.raises(EnvironmentFault, match="device cuda"):
        _check(torch.float32, torch.device("meta"))
    with pytest.raises(EnvironmentFault, match="dtype bfloat16"):
        _check(torch.float32, torch.device("cuda"))
    # A model with nothing to compress asks for nothing.
    assert not use_kernels(tiny_model()).formats


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    weight = (torch.randn(40, 64) * (torch.rand(40, 64) < 0.4)).bfloat16()
    weight[:, ::2] = 0
    packed = gaps.pack(weight, gaps.Shape(4, 2, 2))
    x, bias = torch.randn(3, 64).bfloat16(), torch.randn(40).bfloat16()
    gap = (packed.stream, packed.starts, packed.first)
    return {
        "sparse24_linear": (x, sparse24.pack(weight), bias, 40),
        "gap_linear": (x, *gap, packed.order, bias, 40, *packed.arguments()),
        "mixed24_linear": (x, *vars(mixed24.pack(weight)).values(), bias, 40),
        "weight": (weight,),
        "bias": (bias,),
    }


def gated_arguments() -> dict[str, tuple[Any, ...]]:
    """Of the operators behind gates: arguments, and the weight they stand for."""
    weight = torch.randn(40, 24).bfloat16()
    halved = weight * keep_nm_out(weight.float().abs(), 2, 4, 0.1)
    codes, largest = int8.encode(weight)
    rounded, packed = int8.round_weight(weight), outputs24.pack(halved)
    x, threshold, bias = torch.randn(2, 24).bfloat16(), torch.rand(24), torch.randn(40).bfloat16()
    up, down = torch.randn(40, 3).bfloat16(), torch.randn(3, 24).bfloat16()
    eight, columns = (
        (input_major(codes), int8.scales(largest)),
        (packed.values, packed.keep, packed.index),
    )
    return {
        "gated_linear": (rounded, x, threshold, input_major(rounded), bias, up, down),
        "gated_int8_linear": (rounded, x, threshold, *eight, bias, up, down),
        "gated_24_linear": (halved, x, threshold, *columns, bias, up, down, 40),
        "int8_linear": (rounded, x, *eight, bias),
        "outputs24_linear": (halved[5:33], x, *columns, bias[5:33], 5, 33),
    }


@pytest.mark.parametrize("name", sorted(gated_arguments()))
def test_operators_behind_gates_keep_torchs_contract(name: str) -> None:
    weight, *call = gated_arguments()[name]
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, tuple(call))
    x = call[0].double()
    branch: Any = 0.0
    if "gated" in name:
        bias, up, down = (
            t for t in call[-4 if name == "gated_24_linear" else -3 :] if isinstance(t, Tensor)
        )
        kept = x * (x.abs() > call[1].double())
        branch = (x - kept) @ down.double().t() @ up.double().t()
        x = kept
    elif name == "outputs24_linear":
        bias = call[-3]
    else:
        bias = call[-1]
    expected = x @ weight.double().t() + bias.double() + branch
    found = operator(*call)
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3
    compiled = torch.compile(lambda x: operator(x, *call[1:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call[0]), found)


@pytest.mark.parametrize("name", ["sparse24_linear", "gap_linear", "mixed24_linear"])
def test_operators_keep_torchs_contract(name: str) -> None:
    arguments = operator_arguments()
    call = arguments[name]
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, call)
    expected = nn.functional.linear(call[0], arguments["weight"][0], arguments["bias"][0])
    assert torch.equal(operator(*call), expected)
    compiled = torch.compile(lambda x: operator(x, *call[1:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call[0]), expected)


def test_a_packed_model_compiles_whole() -> None:
    model = pruned_model("50 %")
    pack_linears(model, CPU)
    expected = logits(model)
    compiled = compile_whole(model)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits.float(), expected)


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("packed", [False, True])
def test_decoding_is_that_of_generate(family: str, packed: bool) -> None:
    model = pruned_model("50 %", family)
    if packed:
        pack_linears(model, CPU)
    prompt = IDS[0]
    expected = model.generate(prompt[None], max_new_tokens=9, do_sample=False, eos_token_id=None)[
        0, len(prompt) :
    ]
    decoder = Decoder(model, 32)
    for _ in range(2):  # a decoder serves one prompt after another
        assert [int(token) for token in decoder.generate(prompt, 9)] == expected.tolist()
    with pytest.raises(RecipeError, match="do not fit 32"):
        next(decoder.generate(prompt, 27))


def test_the_bench_of_kernels_needs_a_gpu(cli: Callable[..., Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = cli("bench", "kernels", "-q")
    assert result.exit_code == 4
    assert "needs a CUDA GPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--shapes", "4096"], "write ROWSxCOLUMNS"),
        (["kernels", "--shapes", "16x"], "write ROWSxCOLUMNS"),
        (["kernels", "--shapes", "100x64"], "divisible by 16"),
        (["kernels", "--tokens", "0"], "no positive number"),
        (["model", "x", "--prompt", "3"], "at least 16"),
    ],
)
def test_bad_requests(cli: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = cli("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
