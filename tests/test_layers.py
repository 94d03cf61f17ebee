"""Decoder layers that read few tokens by operators, and these operators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from llmsqueeze import ops
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluate import cache_options
from llmsqueeze.numerics import int8
from llmsqueeze.numerics.packing import pack_bitmask, unpack_bitmask
from llmsqueeze.ops import cpu
from llmsqueeze.ops.layer import rms_norm
from llmsqueeze.runtime import layers
from llmsqueeze.runtime.generate import Decoder, RoomLayer
from llmsqueeze.runtime.linears import use_kernels
from tests.conftest import tiny_model
from tests.test_cpu_kernels import DTYPES, ISAS, off
from tests.test_linears import IDS, logits

NONE = torch.empty(0)


def stored(weight: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As an operator takes it: values, mask, row offsets, scale."""
    if form == "int8":
        codes, largest = int8.encode(weight)
        return codes, NONE, NONE, int8.scales(largest)
    if form == "masked":
        return *pack_bitmask(weight), NONE
    return weight, NONE, NONE, NONE


def exact(parts: tuple[Tensor, ...], form: str, columns: int) -> Tensor:
    if form == "int8":
        return parts[0].double() * parts[3].double()[:, None]
    return (unpack_bitmask(*parts[:3], columns) if form == "masked" else parts[0]).double()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 200),
    st.sampled_from(["masked", "dense", "both", "int8"]),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["", "bias", "residual", "both", "glu"]),
    st.integers(0, 99),
)
def test_products_are_those_of_fp64(
    rows: list[int], columns: int, form: str, dtype: torch.dtype, tokens: int, normed: bool,
    extra: str, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if extra == "glu":
        rows = [rows[0]] * 2
    forms = [("masked", "dense")[i % 2] if form == "both" else form for i in range(len(rows))]
    weights = [
        (some(n, columns) * (torch.rand(n, columns, generator=generator) < 0.5)).to(dtype)
        for n in rows
    ]
    parts = [stored(*each) for each in zip(weights, forms, strict=True)]
    x, norm = some(tokens, columns), some(columns) if normed else None
    bias = some(sum(rows)) if extra in ("bias", "both") else None
    residual = some(tokens, sum(rows)) if extra in ("residual", "both") else None
    seen = x.double()
    if norm is not None:
        seen = seen * torch.rsqrt(seen.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.double()
    dense = [exact(*each, columns) for each in zip(parts, forms, strict=True)]
    y = torch.cat([seen @ w.t() for w in dense], -1)
    size = torch.cat([seen.abs() @ w.abs().t() for w in dense], -1) + 1e-30
    for added in (bias, residual):
        if added is not None:
            y, size = y + added, size + added.abs()
    if extra == "glu":
        gate, up = y.chunk(2, -1)
        left, right = size.chunk(2, -1)
        y = nn.functional.silu(gate) * up
        size = (left + 1) * (right + 1)
    lists = [list(each) for each in zip(*parts, strict=True)]
    for isa in ISAS:
        found = cpu.linears(x, norm, 1e-5, *lists, bias, residual, extra == "glu", isa=isa)
        assert found.shape == y.shape and found.dtype == torch.float32
        assert bool(((found - y).abs() <= 4e-6 * size).all())
    reference = ops.linears(x, norm, 1e-5, *lists, bias, residual, extra == "glu")
    assert bool(((reference - y).abs() <= 4e-6 * size).all())


@pytest.mark.parametrize("form", ["masked", "dense", "int8"])
@pytest.mark.parametrize("glu", [False, True])
def test_the_product_keeps_torchs_contract(form: str, glu: bool) -> None:
    weights = [(torch.randn(24, 40) * (torch.rand(24, 40) < 0.5)).bfloat16() for _ in range(2)]
    lists = [list(each) for each in zip(*(stored(w, form) for w in weights), strict=True)]
    for tokens in (1, 20):
        x, norm = torch.randn(tokens, 40).bfloat16(), torch.rand(40).bfloat16()
        residual = None if glu else torch.randn(tokens, 48).bfloat16()
        call = (x, norm, 1e-5, *lists, None, residual, glu)
        operator: Any = torch.ops.llmsqueeze.linears
        torch.library.opcheck(operator, call)
        seen = rms_norm(x.double(), norm.double(), 1e-5)
        y = [seen @ w.double().t() for w in weights]
        if form == "int8":
            y = [seen @ exact(stored(w, form), form, 40).t() for w in weights]
        expected = (
            nn.functional.silu(y[0]) * y[1] if residual is None else torch.cat(y, -1) + residual
        )
        assert off(operator(*call), expected) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 37, 900])
def test_attention_of_one_token(dtype: torch.dtype, masked: bool, length: int) -> None:
    """No further from fp64 than twice torch's own, over a cache with room left and shared heads."""
    q = torch.randn(2, 9, 1, 40).to(dtype)
    k, v = (torch.randn(2, 3, length + 5, 40).to(dtype)[:, :, :length] for _ in range(2))
    mask = torch.rand(2, 1, 1, length) < 0.7 if masked else None
    if mask is not None:
        mask[..., -1] = True
    call = (q, k, v, mask, torch.zeros(6, dtype=torch.int32), 0.2)
    torch.library.opcheck(torch.ops.llmsqueeze.attend, call)
    wide = [t.double() for t in (q, k, v)]
    expected = ops.attend(*wide, mask, NONE, 0.2)
    theirs = off(ops.attend(*call), expected)
    for isa in ISAS:
        assert off(cpu.attend(*call, isa=isa), expected) <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype: torch.dtype) -> None:
    every = torch.randn(2, 3, 7, 16).to(dtype)
    for cos, sin in (torch.randn(2, 1, 3, 16).to(dtype), torch.randn(2, 2, 3, 16).to(dtype)):
        for x in (every, every[:, :, :5], every[:, :1], every.transpose(1, 2)[:, :3]):
            c, s = cos[:, : x.shape[1]], sin[:, : x.shape[1]]
            torch.library.opcheck(torch.ops.llmsqueeze.rotate, (x, c, s))
            expected = ops.rotate(x.double(), c.double(), s.double())
            assert (
                off(torch.ops.llmsqueeze.rotate(x, c, s), expected)
                < {4: 1e-6, 2: 8e-3}[dtype.itemsize]
            )


def halved(model: Any) -> Any:
    """The model with half of its weights zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand(module.weight.shape) < 0.5
    return model


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A pruned model, and the same with kernels."""
    dense = halved(tiny_model(**changes)).to(dtype)
    fast = copy.deepcopy(dense)
    use_kernels(fast)
    return dense, fast


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that layers reach for, as they do."""
    seen: list[str] = []
    own = cpu.Group.product

    def product(self: Any, *given: Any, **options: Any) -> Tensor:
        seen.append("linears")
        return own(self, *given, **options)

    monkeypatch.setattr(cpu.Group, "product", product)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_four_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, fast = pair(dtype)
    worst = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert all(m.forward.__module__ == layers.__name__ for m in fast.model.layers)
    seen = calls(monkeypatch)
    for ids in (IDS, IDS[:1, :1], IDS[:2, :1]):
        seen.clear()
        assert off(logits(fast, ids), logits(dense, ids).double()) < worst
        few = ids.numel() <= cpu.most_tokens(dtype)
        assert len(seen) == few * 4 * len(fast.model.layers)
    seen.clear()
    assert (
        off(logits(fast, torch.arange(30)[None]), logits(dense, torch.arange(30)[None]).double())
        < worst
    )
    if cpu.most_tokens(dtype) < 30:
        assert not seen


@torch.no_grad()
def test_decoding_step_by_step() -> None:
    """Through every kind of cache, with padding and without."""
    dense, fast = pair()
    ids = torch.arange(24).view(2, 12) % 60 + 2
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    # A cache without a config makes its layers when they are needed: it begins with none.
    kinds = (lambda config: DynamicCache(config=config)), lambda config: DynamicCache()
    for asked, kind in itertools.product(({}, {"attention_mask": mask}), kinds):
        found = []
        for model in (dense, fast):
            cache = kind(model.config)
            rows = []
            for i in range(ids.shape[1]):
                options = {n: m[:, : i + 1] for n, m in asked.items()}
                rows.append(
                    model(ids[:, i : i + 1], **options, **cache_options(model, cache)).logits
                )
            assert cache.get_seq_length() == ids.shape[1]
            found.append(torch.cat(rows, 1)[mask.bool()] if asked else torch.cat(rows, 1))
        assert off(found[1], found[0].double()) < 1e-5
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = dense.generate(ids, attention_mask=mask, **asked)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **asked), expected)
    assert torch.equal(fast.generate(ids, attention_mask=mask, num_beams=2, **asked),
                       dense.generate(ids, attention_mask=mask, num_beams=2, **asked))  # fmt: skip
    alone = dense.generate(ids[:1], **asked)[0, ids.shape[1] :].tolist()
    for model in (dense, fast):
        assert [int(t) for t in Decoder(model, 20).generate(ids[0], 6)] == alone


def test_layers_that_someone_watches_stay_as_they_are() -> None:
    dense, fast = pair()
    with torch.no_grad():
        out = fast(IDS, use_cache=False, output_hidden_states=True)
        expected = dense(IDS, use_cache=False, output_hidden_states=True)
    for one, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert off(one, other.double()) < 1e-5
    expected = logits(dense, IDS).double()
    for path in ("self_attn", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
        watched: list[Any] = []
        hook = (
            fast.model.layers[0]
            .get_submodule(path)
            .register_forward_hook(lambda *given, to=watched: to.append(given))
        )
        assert off(logits(fast, IDS), expected) < 1e-5
        assert len(watched) == 1, path
        hook.remove()
        logits(fast, IDS)
        assert len(watched) == 1, path


def test_layers_whose_modules_are_replaced_use_them() -> None:
    dense, fast = pair()
    for model in (dense, fast):
        layer = model.model.layers[1]
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Tanh())
    assert off(logits(fast, IDS), logits(dense, IDS).double()) < 1e-5


def test_a_copy_is_refused() -> None:
    _, fast = pair()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(fast)


def test_operators_when_asked() -> None:
    names: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "llmsqueeze":
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    _, fast = pair()
    with torch.no_grad(), Watch(), layers.through_operators():
        fast(IDS[:1, :1], use_cache=False)
    count = len(fast.model.layers)
    assert names.count("linears") == 4 * count
    assert names.count("rotate") == names.count("attend") == count


def test_room_for_so_many_tokens() -> None:
    layer = RoomLayer(5)
    keys = torch.randn(1, 2, 7, 4)
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        found, _ = layer.update(keys[:, :, begin:end], keys[:, :, begin:end])
        assert torch.equal(found, keys[:, :, :end]) and layer.get_seq_length() == end
    with pytest.raises(RecipeError, match="6 tokens do not fit 5"):
        layer.update(keys[:, :, :1], keys[:, :, :1])
    cache = Cache(layers=[layer])
    cache.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 2 * 5 * 2 * 4 * 4
    assert torch.equal(layer.update(keys[:, :, :2], keys[:, :, :2])[1], keys[:, :, :2])


def test_families(tiny: Callable[..., Path]) -> None:
    """Layers that compute something else are left alone."""
    for family, expected in (("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", False),
                             ("gemma2", False)):  # fmt: skip
        model = halved(AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32))
        before = logits(model, IDS)
        use_kernels(model)
        changed = [vars(m).get("forward") for m in model.modules()]
        assert any(getattr(f, "__module__", "") == layers.__name__ for f in changed) == expected
        assert off(logits(model, IDS), before.double()) < 1e-5
