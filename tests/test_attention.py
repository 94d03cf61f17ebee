"""Attention of single tokens: the operator against plain loops, and in models on its reference."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from llmsqueeze.evaluate import cache_options
from llmsqueeze.ops import attend, attend_fits, cuda, kernels
from llmsqueeze.runtime import attention
from tests.conftest import TINY, tiny_model

IDS = torch.arange(5, 13)[None]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_softmax_of_products(heads: tuple[int, int], masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, heads[0], 1, 16, generator=generator)
    k, v = torch.randn(2, 2, heads[1], 9, 16, generator=generator)
    mask = torch.rand(2, 1, 1, 9, generator=generator) < 0.6 if masked else None
    if mask is not None:
        mask[..., 4] = True
    counters = torch.zeros(8, dtype=torch.int32)
    found = torch.ops.llmsqueeze.attend(q, k, v, mask, counters, 0.3)
    assert found.shape == (2, 1, heads[0], 16)
    for sample in range(2):
        for head in range(heads[0]):
            own = head // (heads[0] // heads[1])
            seen = range(9) if mask is None else mask[sample, 0, 0].nonzero().flatten().tolist()
            weights = {
                t: float((0.3 * (q[sample, head, 0].double() @ k[sample, own, t].double())).exp())
                for t in seen
            }
            total = sum(weights.values())
            expected = sum(w / total * v[sample, own, t].double() for t, w in weights.items())
            assert torch.allclose(found[sample, 0, head].double(), expected, atol=1e-5)
    torch.library.opcheck(torch.ops.llmsqueeze.attend, (q, k, v, mask, counters, 0.3))


def test_what_fits() -> None:
    def fits(
        width: int = 64,
        heads: int = 8,
        kv: int = 2,
        new: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> bool:
        k = torch.zeros(1, kv, 5, width, dtype=dtype)
        return attend_fits(torch.zeros(1, heads, new, width, dtype=dtype), k, k, None)

    assert fits() and fits(256, 8, 2) and fits(dtype=torch.float16) and fits(96)
    assert not any((fits(new=2), fits(dtype=torch.float32), fits(width=60), fits(width=512)))
    assert not fits(heads=18, kv=2) and not fits(256, 8, 1)
    q = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)
    assert not attend_fits(q, k, k, torch.zeros(1, 1, 1, 5))  # a mask that is added
    assert not attend_fits(q, k, k, torch.ones(1, 2, 1, 5, dtype=torch.bool))  # one for each head
    assert not attend_fits(q, k.transpose(2, 3).contiguous().transpose(2, 3), k, None)


@pytest.mark.parametrize("family", sorted(set(TINY) - {"gemma2"}))
def test_models_attend_by_the_operator(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(IDS).logits[:, 4:].float()
    attention.install(model)
    calls = []

    def counted(*given: object) -> torch.Tensor:
        calls.append(given)
        return attend(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.ops.llmsqueeze, "attend", counted)
    # Widths of tiny heads are not what the kernel takes.
    monkeypatch.setattr(attention, "attend_fits", lambda q, k, v, mask: q.shape[2] == 1)
    cache = StaticCache(config=model.config, max_cache_len=16)
    options = cache_options(model, cache)
    with torch.no_grad():
        found = [model(IDS[:, :5], **options).logits[:, -1:]]
        assert not calls  # a prompt is transformers' own affair
        found += [model(IDS[:, i : i + 1], **options).logits for i in range(5, 8)]
    assert len(calls) == 3 * model.config.num_hidden_layers
    got = torch.cat(found, dim=1).float()
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_graphs_keep_their_counters() -> None:
    model = tiny_model().to(torch.bfloat16)
    attention.install(model)
    held = [m.llmsqueeze_counters for m in model.modules() if hasattr(m, "llmsqueeze_counters")]
    assert len(held) == model.config.num_hidden_layers
    attention.install(model)
    again = [m.llmsqueeze_counters for m in model.modules() if hasattr(m, "llmsqueeze_counters")]
    assert all(one is two for one, two in zip(held, again, strict=True))


@pytest.mark.parametrize("width", [8, 64, 256])
def test_blocks_fit_the_memory_of_the_last_one(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(cuda, "launch", lambda *given, **options: launches.append(options))
    monkeypatch.setattr(cuda, "architecture", lambda index: ("sm_90", 500))
    monkeypatch.setattr(cuda, "is_hopper", lambda index: True)
    q = torch.zeros(1, 2, 1, width, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 1, width, dtype=torch.bfloat16).expand(1, 1, 100_000, width)
    kernels.attend(q, k, k, None, torch.zeros(1, dtype=torch.int32), 1.0)
    (options,) = launches
    assert 4 * 2 * options["grid"][0] <= options["shared"]


def test_models_on_a_cpu_are_left_alone() -> None:
    model = tiny_model().to(torch.bfloat16)
    attention.accept(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_changes_attention_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    module.register_buffer("llmsqueeze_counters", torch.zeros(8, dtype=torch.int32))
    monkeypatch.setattr(torch.ops.llmsqueeze, "attend", lambda *_: pytest.fail("taken"))
    q, k = (torch.randn(1, 2, n, 8).bfloat16() for n in (1, 5))
    out, _ = attention.attend(module, q, k, k, None, dropout=0.5)
    assert out.shape == (1, 1, 2, 8)
    with pytest.raises(ValueError, match="softcap"):
        attention.attend(module, q, k, k, None, softcap=30.0)
    out, _ = attention.attend(torch.nn.Module(), q, k, k, None)  # not of a model that was prepared
    assert out.shape == (1, 1, 2, 8)
