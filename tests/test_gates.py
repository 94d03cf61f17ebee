"""Gates at run time: operators, policies, what is gated when, counting, installation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze.errors import RecipeError
from llmsqueeze.ops import gate, gated_linear
from llmsqueeze.policy import Policy
from llmsqueeze.runtime.gates import GatedLinear, GateParts, Gating, install
from tests.conftest import compile_whole, tiny_model

INF = torch.inf


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_compares_in_fp32_and_strictly(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0], dtype=dtype)
    assert gate(x, torch.tensor([1.0, 0.9999999, 0.4, 3.0, 0.0])).tolist() == [0, -1, 0.5, 0, 0]
    # A threshold that the dtype would round to the value itself still counts.
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert gate(torch.ones(1, dtype=dtype), above.reshape(1)).tolist() == [0]
    assert gate(x, torch.full((5,), -1.0)).tolist() == x.tolist()
    assert gate(x, torch.full((5,), INF)).tolist() == [0] * 5
    assert bool(gate(torch.tensor([float("nan")], dtype=dtype), torch.tensor([INF])).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_kept_is_the_dense_linear_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias = random(3, 40, dtype=dtype), random(24, 40, seed=1, dtype=dtype), random(24)
    bias = bias.to(dtype)
    dense = nn.functional.linear(x, weight, bias)
    assert torch.equal(gated_linear(x, torch.full((40,), -1.0), weight, bias, None, None), dense)
    x[:, 3] = 0
    dense = nn.functional.linear(x, weight, bias)
    assert torch.equal(gated_linear(x, torch.zeros(40), weight, bias, None, None), dense)


def test_the_linear_sees_what_the_gate_keeps_and_nothing_else() -> None:
    x, weight, threshold = random(2, 40), random(24, 40, seed=1), random(40, seed=2).abs()
    out = gated_linear(x, threshold, weight, None, None, None)
    expected = torch.stack(
        [
            sum((row[j] * weight[:, j].double() for j in range(40) if abs(row[j]) > threshold[j]),
                torch.zeros(24, dtype=torch.float64))
            for row in x.double()
        ]
    )  # fmt: skip
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.equal(out, gated_linear(x, threshold, weight, None, None, None))
    assert torch.equal(out, nn.functional.linear(gate(x, threshold), weight))
    # What no token keeps may hold anything.
    unused = (x.abs() <= threshold).all(0)
    assert unused.any() and not unused.all()
    poisoned = weight.masked_fill(unused, 1e30)
    assert torch.equal(out, gated_linear(x, threshold, poisoned, None, None, None))
    assert not torch.equal(
        out, gated_linear(x, threshold, weight.masked_fill(~unused, 1e30), None, None, None)
    )
    bias = random(24, seed=3)
    shut = gated_linear(x, torch.full((40,), INF), weight, bias, None, None)
    assert torch.equal(shut, bias.expand(2, 24))


def test_the_branch_takes_what_is_dropped() -> None:
    x, weight, threshold = random(3, 16), random(8, 16, seed=1), torch.ones(16)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = (left * values).float(), right.float()
    full = gated_linear(x, threshold, weight, None, up, down)
    assert torch.allclose(full, nn.functional.linear(x, weight), atol=1e-5)
    kept = gate(x, threshold)
    part = gated_linear(x, threshold, weight, None, up[:, :2], down[:2])
    expected = kept @ weight.t() + (x - kept) @ down[:2].t() @ up[:, :2].t()
    assert torch.allclose(part, expected, atol=1e-5)
    every = gated_linear(x, torch.full((16,), -1.0), weight, None, up, down)
    assert torch.equal(every, nn.functional.linear(x, weight))


@pytest.mark.parametrize("name", ["gate", "gated_linear"])
def test_operators_are_well_formed(name: str) -> None:
    x, threshold, weight = random(2, 12), random(12, seed=1).abs(), random(5, 12, seed=2)
    args: tuple[Any, ...] = (x, threshold)
    if name == "gated_linear":
        args = (x, threshold, weight, random(5), random(5, 3), random(3, 12))
    op = getattr(torch.ops.llmsqueeze, name)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("text", "first"),
    [("dense", 10), ("all", 0), ("tail:0.5", 5), ("tail:0.99", 1), ("tail:1", 0), ("tail:0", 10),
     ("after:4", 4), ("after:0", 0), ("after:99", 10)],
)  # fmt: skip
def test_policies(text: str, first: int) -> None:
    policy = Policy.parse(text)
    assert str(policy) == text
    assert policy.first_gated(10) == first
    assert policy.first_gated(1) == 0  # decoding


@pytest.mark.parametrize("text", ["", "none", "tail", "tail:1.5", "tail:-1", "after:x", "after:-2"])
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(RecipeError, match="policy"):
        Policy.parse(text)


class Pair(nn.Module):  # type: ignore[misc]
    """Two linears fed by one tensor, and one fed by their sum, as in a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.act = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c(self.act(self.a(hidden_states) + self.b(hidden_states)))


def gated_pair(policy: str) -> tuple[Pair, Pair, Gating]:
    plain, model = Pair(), Pair()
    parts = {
        "in": GateParts("input", "a", ("a", "b"), torch.full((8,), 0.7)),
        "out": GateParts("output", "act", ("c",), torch.full((6,), 0.3)),
    }
    return plain, model, install(model, parts, Policy.parse(policy), [model])


@pytest.mark.parametrize("policy", ["dense", "all", "tail:0.5", "after:3"])
@torch.no_grad()
def test_positions_before_the_first_gated_one_are_dense(policy: str) -> None:
    plain, model, _ = gated_pair(policy)
    x = random(2, 8, 8)
    first = Policy.parse(policy).first_gated(8)
    dense, out = plain(x), model(x)
    assert torch.equal(out[:, :first], dense[:, :first])
    hidden = plain.a(gate(x, torch.full((8,), 0.7))) + plain.b(gate(x, torch.full((8,), 0.7)))
    expected = plain.c(gate(hidden.relu(), torch.full((6,), 0.3)))
    assert torch.allclose(out[:, first:], expected[:, first:], atol=1e-6)
    # One token alone is decoding: gated by every policy.
    assert torch.allclose(model(x[:1, :1]), expected[:1, :1], atol=1e-6)


@torch.no_grad()
def test_counting_is_of_gated_tokens_only() -> None:
    _, model, gating = gated_pair("after:3")
    x = random(4, 10, 8)
    model(x)
    assert gating.sparsity() == {}
    gating.count()
    model(x[:2])
    model(x[2:])
    expected = float((x[:, 3:].abs() <= 0.7).double().mean())
    assert gating.sparsity()["in"] == pytest.approx(expected, rel=1e-9)
    gating.count()
    assert gating.sparsity() == {}


@torch.no_grad()
def test_flattened_tokens_are_gated_by_their_position() -> None:
    """OPT flattens samples and tokens: the block's own input says how long a pass is."""

    class Flat(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.fc = nn.Linear(8, 5)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.fc(hidden_states.reshape(-1, 8)).reshape(*hidden_states.shape[:2], 5)

    model = Flat()
    plain = Flat()
    part = GateParts("input", "fc", ("fc",), torch.full((8,), 0.7))
    install(model, {"fc": part}, Policy.parse("after:2"), [model])
    x = random(3, 6, 8)
    assert torch.equal(model(x)[:, :2], plain(x)[:, :2])
    shut = nn.functional.linear(gate(x, part.threshold), plain.fc.weight, plain.fc.bias)
    assert torch.allclose(model(x)[:, 2:], shut[:, 2:], atol=1e-6)


@torch.no_grad()
def test_casting_a_model_leaves_thresholds_alone() -> None:
    threshold = random(8).abs()
    model = Pair()
    install(model, {"in": GateParts("input", "a", ("a", "b"), threshold)}, Policy("all"), [model])
    model.to(torch.bfloat16)
    assert isinstance(model.a, GatedLinear)
    assert model.a.gate is model.b.gate
    assert torch.equal(model.a.gate.threshold, threshold)
    assert model.a.weight.dtype == torch.bfloat16
    assert set(model.state_dict()) == set(Pair().state_dict())


@torch.no_grad()
def test_a_union_of_tokens_keeps_at_most_what_independent_ones_would() -> None:
    x = random(64, 4, 256) + random(1, 1, 256, seed=1)  # channels differ, hence correlate
    share = float((gate(x, torch.full((256,), 1.0)) == 0).double().mean())
    for batch in (2, 4):
        kept = (gate(x[:, :batch], torch.full((256,), 1.0)) != 0).any(1)
        assert float(kept.double().mean()) <= 1 - share**batch + 0.02


@torch.no_grad()
def test_decoding_is_the_last_token_of_a_pass() -> None:
    """Token by token through the cache gives what gating every token at once gives."""
    model = tiny_model("llama")
    parts = {}
    for index in range(3):
        prefix = f"model.layers.{index}."
        qkv = tuple(f"{prefix}self_attn.{n}_proj" for n in "qkv")
        parts[qkv[0]] = GateParts("input", qkv[0], qkv, torch.full((40,), 0.5))
        down = f"{prefix}mlp.down_proj"
        parts[down] = GateParts("input", down, (down,), torch.full((72,), 0.001))
    gating = install(model, parts, Policy("all"), model.model.layers)
    ids = torch.randint(3, 160, (1, 4), generator=torch.Generator().manual_seed(0))
    found = model.generate(
        ids,
        do_sample=False,
        min_new_tokens=8,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = model(found.sequences).logits[:, 3:-1]
    assert torch.allclose(torch.stack(found.logits, 1), whole, atol=1e-4)
    gating.policy = Policy("dense")
    assert not torch.allclose(model(found.sequences).logits[:, 3:-1], whole, atol=1e-3)


@torch.no_grad()
def test_a_gated_model_compiles_whole() -> None:
    _, model, _ = gated_pair("all")
    compiled = compile_whole(model)
    for shape in ((1, 1, 8), (2, 5, 8)):
        x = random(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
