"""Gate and up projections as one product, their activation included."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, sparse24
from llmsqueeze.numerics.masks import keep_nm, keep_nm_out, keep_tiles
from llmsqueeze.ops import in_pairs, input_major, swiglu
from llmsqueeze.policy import Policy
from llmsqueeze.runtime import mlp
from llmsqueeze.runtime.gates import GateParts, install
from llmsqueeze.runtime.linears import pack_linears
from tests.conftest import compile_whole, tiny_model
from tests.test_linears import IDS, logits, of_format, pruned_model

CPU = torch.device("cpu")
OUT, IN = 24, 64


def exact(x: Tensor, gate: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate x) · (up x) in fp64. bias: of gate, then of up."""
    g, u = x.double() @ gate.double().t(), x.double() @ up.double().t()
    if bias is not None:
        g, u = g + bias[:OUT].double(), u + bias[OUT:].double()
    return g / (1 + (-g).exp()) * u


def test_pairs_find_each_other() -> None:
    gate, up = torch.randn(OUT, 5), torch.randn(OUT, 5)
    y = swiglu(in_pairs(gate, up).t())
    assert torch.allclose(y, (nn.functional.silu(gate) * up).t())
    assert in_pairs(gate, up)[16].equal(gate[8]) and in_pairs(gate, up)[8].equal(up[0])


def operators() -> dict[str, tuple[Tensor, tuple[Any, ...], int]]:
    """Operator → the [48, 64] weight in pairs, arguments after x without the bias, the place of the bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * OUT, IN, generator=generator).bfloat16()
    scores = weight.float().abs()
    halved, loose = weight * keep_nm(scores, 2, 4), weight * (scores > 0.8)
    tiles, along = weight * keep_tiles(scores, 16, 3), weight * keep_nm_out(scores, 2, 4, 0.1)
    codes, largest = int8.encode(weight)
    eight, rounded = (input_major(codes), int8.scales(largest)), int8.round_weight(weight)
    gap, columns = gaps.pack(loose, gaps.Shape(3, 2, 2), together=16), outputs24.pack(along)
    threshold = torch.full((1,), -1.0)  # all inputs count
    rows = 2 * OUT
    return {
        "sparse24_linear": (halved, (sparse24.pack(halved), rows), 2),
        "mixed24_linear": (tiles, (*vars(mixed24.pack(tiles)).values(), rows), 5),
        "gap_linear": (
            loose, (gap.stream, gap.starts, gap.first, gap.order, rows, *gap.arguments()), 5,
        ),
        "int8_linear": (rounded, eight, 3),
        "gated_linear": (weight, (threshold, input_major(weight), None, None), 3),
        "gated_int8_linear": (rounded, (threshold, *eight, None, None), 4),
        "gated_24_linear": (
            along, (threshold, columns.values, columns.keep, columns.index, None, None, rows), 5,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(operators()))
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_operators_end_in_an_activation(name: str, tokens: int, biased: bool) -> None:
    weight, arguments, place = operators()[name]
    x = torch.randn(tokens, IN).bfloat16()
    bias = torch.randn(2 * OUT).bfloat16() if biased else None
    stored = None if bias is None else in_pairs(bias[:OUT], bias[OUT:])
    call = [x, *arguments]
    call.insert(place, stored)
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, tuple(call), {"glu": True})
    gate, up = weight.unflatten(0, (-1, 2, 8)).transpose(0, 1).flatten(1, 2)
    expected = exact(x, gate, up, bias)
    found = operator(*call, glu=True)
    assert found.shape == (tokens, OUT)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("packed", ["2:4", "50 %"])
def test_an_mlp_is_two_products(packed: str) -> None:
    model = pruned_model(packed)
    pack_linears(model, CPU)
    block = model.model.layers[0].mlp
    assert isinstance(block, mlp.PackedMLP)
    calls: list[int] = []
    for product in (block.product, block.down_proj):
        product.register_forward_hook(lambda *given: calls.append(given[2].shape[-1]))
    logits(model)
    assert calls == [72, 40]


@pytest.mark.parametrize("format", ["plain", "int8", "2:4-out"])
@pytest.mark.parametrize("rank", [0, 4])
def test_gates_stand_before_an_mlp(format: str, rank: int) -> None:
    model = tiny_model().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for index in range(len(model.model.layers)):
        names = tuple(f"model.layers.{index}.mlp.{n}" for n in mlp.PAIR)
        width = model.get_submodule(names[0]).in_features
        down = torch.randn(rank, width, generator=generator) * 0.1 if rank else None
        ups = {n: torch.randn(72, rank, generator=generator) * 0.1 for n in names} if rank else None
        parts[names[0]] = GateParts("input", names[0], names, torch.full((width,), 0.4), down, ups)
    install(model, parts, Policy.parse("tail:0.5"), model.model.layers)
    of_format(model, format)
    inputs = [IDS, IDS[:1, :1]]
    expected = [logits(model, ids) for ids in inputs]
    pack_linears(model, CPU)
    assert isinstance(model.model.layers[0].mlp, mlp.PackedMLP)
    for ids, reference in zip(inputs, expected, strict=True):
        assert float((logits(model, ids) - reference).norm() / reference.norm()) < 0.01
    compiled = compile_whole(model)
    with torch.no_grad():
        found = compiled(inputs[1], use_cache=False).logits.float()
    assert float((found - expected[1]).norm() / expected[1].norm()) < 0.01


def with_hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda *given: None)


def with_gelu(block: nn.Module) -> None:
    block.act_fn = nn.GELU()


def with_another_part(block: nn.Module) -> None:
    block.norm = nn.Identity()


def with_a_forward_of_its_own(block: nn.Module) -> None:
    block.forward = type(block).forward.__get__(block)


def with_a_hooked_activation(block: nn.Module) -> None:
    block.act_fn.register_forward_hook(lambda *given: None)


def with_a_subclass(block: nn.Module) -> None:
    class Doubled(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.__class__ = Doubled


@pytest.mark.parametrize("change",
    [with_hook, with_gelu, with_another_part, with_a_subclass, with_a_forward_of_its_own,
     with_a_hooked_activation],
)  # fmt: skip
def test_another_mlp_is_left_alone(change: Callable[[nn.Module], None]) -> None:
    model = pruned_model("2:4")
    for layer in model.model.layers:
        assert mlp.is_swiglu(layer.mlp)
        change(layer.mlp)
        assert not mlp.is_swiglu(layer.mlp)
    expected = logits(model)
    pack_linears(model, CPU)
    assert not any(isinstance(m, mlp.PackedMLP) for m in model.modules())
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.01


def test_tiles_and_unequal_halves_are_not_paired() -> None:
    for pattern in ("tiles", "unequal"):
        model = pruned_model("tiles" if pattern == "tiles" else "50 %")
        if pattern == "unequal":
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.data[:, ::3] = 0
        expected = logits(model)
        pack_linears(model, CPU)
        assert not any(isinstance(m, mlp.PackedMLP) for m in model.modules())
        assert float((logits(model) - expected).norm() / expected.norm()) < 0.01


def test_dense_weights_go_as_packed_ones_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_model("2:4")
    seen = [weakref.ref(layer.mlp.gate_proj.weight) for layer in model.model.layers]
    alive: list[int] = []
    pack = sparse24.pack

    def noting(weight: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        return pack(weight)

    monkeypatch.setattr(sparse24, "pack", noting)
    pack_linears(model, CPU)
    assert alive[-1] == 0 and len(set(alive)) == len(seen) + 1


def test_pairs_stay_together_among_rows_of_every_length() -> None:
    density = torch.linspace(0.1, 1, 10).repeat_interleave(16)[:, None]
    weight = torch.randn(160, 300).bfloat16() * (torch.rand(160, 300) < density)
    for parts in (1, 2):
        packed = gaps.pack(weight, gaps.Shape(3, parts, 2), together=16)
        groups = packed.order[:160].view(-1, 16)
        assert torch.equal(groups, groups[:, :1] + torch.arange(16, dtype=torch.int32))
        assert groups[:, 0].tolist() == [144 - 16 * i for i in range(10)]  # the longest first
        assert torch.equal(gaps.unpack(packed, 160, 300, torch.bfloat16), weight)
