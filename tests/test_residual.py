"""Residuals that projections add themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze.policy import Policy
from llmsqueeze.runtime import residual
from llmsqueeze.runtime.gates import GateParts, install
from llmsqueeze.runtime.linears import pack_linears
from tests.conftest import compile_whole, tiny_model
from tests.test_linears import IDS, logits, of_format, pruned_model
from tests.test_mlp import IN, OUT, operators

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(operators()))
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_operators_add_what_every_token_brings(name: str, shape: tuple[int, ...]) -> None:
    weight, arguments, place = operators()[name]
    x = torch.randn(*shape, IN).bfloat16()
    residual = torch.randn(*shape, 2 * OUT).bfloat16()
    call = [x, *arguments]
    call.insert(place, residual)
    operator = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(operator, tuple(call))
    expected = x.double() @ weight.double().t() + residual.double()
    found = operator(*call)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


def joined(model: nn.Module) -> list[bool]:
    return [isinstance(m.mlp.down_proj, residual.AddingLinear) for m in model.model.layers]


@pytest.mark.parametrize("packed", ["2:4", "50 %", "tiles"])
def test_layers_add_by_their_projections(packed: str) -> None:
    model = pruned_model(packed)
    expected = logits(model)
    pack_linears(model, CPU)
    assert all(joined(model))
    added: list[tuple[int, ...]] = []
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.linear.register_forward_hook(lambda *given: added.append(given[1][1].shape))
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.01
    assert added == [(*IDS.shape, 40)] * 2 * len(model.model.layers)
    assert all(m.residual is None for m in model.modules() if isinstance(m, residual.AddingLinear))
    with torch.no_grad():
        found = compile_whole(model)(IDS, use_cache=False).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("format", ["plain", "int8", "2:4-out"])
@pytest.mark.parametrize("policy", ["tail:0.5", "all"])
def test_gated_projections_add_too(format: str, policy: str) -> None:
    # In 16 bits a rounding more or less decides whether an input passes a gate.
    model = tiny_model().to(torch.bfloat16 if format == "2:4-out" else torch.float32)
    parts = {}
    for index in range(len(model.model.layers)):
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{leaf}"
            width = model.get_submodule(name).in_features
            parts[name] = GateParts("input", name, (name,), torch.full((width,), 0.05))
    install(model, parts, Policy.parse(policy), model.model.layers)
    of_format(model, format)
    inputs = [IDS, IDS[:1, :1]]
    expected = [logits(model, ids) for ids in inputs]
    pack_linears(model, CPU)
    assert all(joined(model))
    for ids, reference in zip(inputs, expected, strict=True):
        off = float((logits(model, ids) - reference).norm() / reference.norm())
        assert off < (0.03 if format == "2:4-out" else 1e-4)


def scaled(layer: Any) -> None:
    class Doubled(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward(hidden_states, **options)

    layer.__class__ = Doubled


def scaled_attention(layer: Any) -> None:
    class Doubled(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Any]:
            y, weights = super().forward(*args, **options)
            return 2 * y, weights

    layer.self_attn.__class__ = Doubled


def watched_mlp(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *given: None)


def dense_output(layer: Any) -> None:
    layer.self_attn.o_proj.weight.data.copy_(torch.randn_like(layer.self_attn.o_proj.weight))


@pytest.mark.parametrize("change", [scaled, scaled_attention, watched_mlp, dense_output])
def test_other_layers_are_left_alone(change: Callable[[Any], None]) -> None:
    model = pruned_model("50 %")
    change(model.model.layers[0])
    expected = logits(model)
    pack_linears(model, CPU)
    assert joined(model) == [False] + [True] * (len(model.model.layers) - 1)
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.01


def test_hidden_states_can_be_asked_for() -> None:
    model = pruned_model("2:4")
    plain = copy.deepcopy(model)
    pack_linears(model, CPU)
    with torch.no_grad():
        found, expected = (m(IDS, output_hidden_states=True).hidden_states for m in (model, plain))
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) < 0.01
