"""The packed KV cache: what it holds, what attention sees, and that transformers can use it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluate import cache_options, perplexity
from llmsqueeze.numerics.codebook import normal_codebook
from llmsqueeze.numerics.feedback import Feedback, factorise
from llmsqueeze.numerics.hadamard import hadamard
from llmsqueeze.numerics.kv_codecs import (
    ChannelCodec,
    Codebook,
    Codec,
    Fp8,
    Identity,
    Rotated,
    TokenCodec,
)
from llmsqueeze.runtime import load, turned
from llmsqueeze.runtime.kv_cache import (
    LayerFormat,
    PackedLayer,
    bits_per_element,
    packed_cache,
    parse_format,
)
from llmsqueeze.runtime.positions import Positions
from tests.conftest import tiny_model

NAMES = ("fp8", "rotate:4", "rotate:3", "rotate:2")
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "opt",
    "gpt_neox",
]
AS_IT_IS = LayerFormat(Identity(), Identity())


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_back(codec: Codec, x: Tensor) -> Tensor:
    """What [tokens, width] come back as."""
    parts = codec.encode(x[None, None])
    return codec.decode(parts, x.shape[-1], torch.float32)[0, 0]


def calibrated(
    heads: int, width: int, *, slots: int = 1, bits: int = 3, sinks: int = 0
) -> LayerFormat:
    """A format as calibration might have made it."""
    book = Codebook(bits, *[torch.linspace(-1, 1, 2**bits, dtype=torch.float64)] * 2)
    metric = torch.eye(width).expand(heads, -1, -1) + 0.3
    keys = ChannelCodec(
        book, vectors(heads, 1, width) * 0.3, vectors(heads, 1, width).abs() + 1, slots,
        Feedback.of(*factorise(metric, 2)),
    )  # fmt: skip
    return LayerFormat(keys, TokenCodec(book, 0, turned=True), sinks)


def layer_of(name: str, heads: int, width: int) -> PackedLayer:
    if name != "calibrated":
        return PackedLayer(parse_format(name))
    return PackedLayer(calibrated(heads, width, sinks=2), Positions(None), owner=True)


# The formats


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotate_by_its_definition(bits: int) -> None:
    x = vectors(7, 24) * torch.tensor([0.01, 1, 300.0])[torch.arange(7) % 3, None]
    codebook = normal_codebook(bits).tolist()
    found = read_back(Rotated(bits), x)
    for row, got in zip(x.double(), found, strict=True):
        turned = hadamard(row).tolist()
        rms = math.sqrt(sum(v * v for v in turned) / len(turned))
        coded = [min(codebook, key=lambda c, v=v: abs(v / rms - c)) for v in turned]  # type: ignore[misc]
        scale = sum(v * c for v, c in zip(turned, coded, strict=True)) / sum(c * c for c in coded)
        expected = hadamard(torch.tensor(coded).double() * scale)
        assert torch.allclose(got.double(), expected, rtol=1e-3, atol=2e-3 * rms)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotate_loses_what_the_theory_says(bits: int) -> None:
    error = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]  # Max 1960, per unit of power
    x = vectors(4000, 128) * torch.logspace(-0.5, 0.5, 128)  # channels differ
    lost = (read_back(Rotated(bits), x) - x).square().sum(1) / x.square().sum(1)
    assert float(lost.mean()) == pytest.approx(error, rel=0.1)


def test_fp8_rounds_to_its_four_significant_bits() -> None:
    x = vectors(500, 64)
    found = read_back(Fp8(), x)
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    # Half a unit in the last of 4 significant bits; below 2^-6 of the scale steps stop shrinking.
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) * 1.002
    assert bool(((found - x).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_extremes(name: str) -> None:
    format = parse_format(name).keys
    zeros = torch.zeros(2, 16)
    assert torch.equal(read_back(format, zeros), zeros)
    for size in (1e-3, 1e4):
        x = vectors(3, 16) * size
        assert float((read_back(format, x) - x).norm() / x.norm()) < 0.5
    spike = torch.zeros(1, 16)
    spike[0, 3] = 5.0
    assert bool(torch.isfinite(read_back(format, spike)).all())


@pytest.mark.parametrize(
    "text", ["", "fp4", "rotate", "rotate:5", "rotate:4:4", "rotate:x", "fp8:8"]
)
def test_formats_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="use fp8, or rotate:4"):
        parse_format(text)


# The layer


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
def test_token_by_token_is_all_at_once(name: str) -> None:
    keys, values = vectors(2, 3, 11, 20), vectors(2, 3, 11, 20, seed=1)
    whole, pieces = layer_of(name, 3, 20), layer_of(name, 3, 20)
    seen = whole.update(keys, values)
    start = 0
    for length in (1, 1, 5, 4):
        stop = start + length
        got = pieces.update(keys[:, :, start:stop], values[:, :, start:stop])
        for part, expected in zip(got, seen, strict=True):
            assert torch.allclose(part, expected[:, :, :stop], rtol=1e-6, atol=1e-6)
        start = stop
        assert pieces.get_seq_length() == stop
    held = [[*layer._parts[0], *layer._parts[1], *layer._sinks] for layer in (whole, pieces)]
    for one, other in zip(*held, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
def test_the_first_update_is_quantised_already(name: str) -> None:
    """transformers' own quantised cache returns what it was given at first: a false zero error."""
    keys, values = vectors(1, 2, 9, 16), vectors(1, 2, 9, 16, seed=1)
    layer = layer_of(name, 2, 16)
    codecs = layer.format.keys, layer.format.values
    seen = layer.update(keys, values)
    for x, got, codec in zip((keys, values), seen, codecs, strict=True):
        read = codec.decode(codec.encode(x), 16, torch.float32)
        first = layer.format.sinks
        assert torch.equal(got[:, :, first:], read[:, :, first:])
        assert not torch.equal(got[:, :, first:], x[:, :, first:])


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
@pytest.mark.parametrize("width", [16, 20, 64, 80, 128])
def test_bits_are_those_allocated(name: str, width: int) -> None:
    cache = DynamicCache()
    first = layer_of(name, 3, width)
    cache.layers = [first, PackedLayer(first.format, first.positions)]
    for layer in cache.layers:
        assert layer.nbytes == layer.elements == 0
    for length in (5, 1, 1):
        for layer in cache.layers:
            layer.update(vectors(2, 3, length, width), vectors(2, 3, length, width))
    cache.crop(-2)
    tokens, sinks = 5, first.format.sinks
    for layer in cache.layers:
        assert layer.elements == 2 * 2 * 3 * tokens * width
        kept = 2 * 2 * 3 * sinks * width * 2
        ids = 2 * tokens * 4 if layer.owner else 0
        formula = layer.elements * first.format.bits_per_element(3, width) / 8
        assert layer.nbytes == pytest.approx(formula + kept + ids)
    assert bits_per_element(cache) == pytest.approx(
        8 * sum(layer.nbytes for layer in cache.layers) / (2 * cache.layers[0].elements)
    )
    found = first.format.bits_per_element(3, width)
    if name == "calibrated":
        # Codes; one slot of three bytes with keys; one number by token with turned values.
        codes = math.ceil(width / 8) * 8 * 3 / width
        assert found == pytest.approx(codes + (24 / width + 16 / (3 * width)) / 2)
        return
    bits = {"fp8": 8, "rotate:4": 4, "rotate:3": 3, "rotate:2": 2}[name]
    codes = width if bits == 8 else math.ceil(width / 8) * bits
    assert found == 8 * (codes + 2) / width


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
def test_rows_and_tokens_can_be_taken_away(name: str) -> None:
    keys, values = vectors(3, 2, 6, 16), vectors(3, 2, 6, 16, seed=1)
    nothing = keys[:, :, :0]

    def held(change: Any) -> tuple[Tensor, Tensor]:
        layer = layer_of(name, 2, 16)
        layer.update(keys, values)
        change(layer)
        return layer.update(*(x[: layer.keys.shape[0]] for x in (nothing, nothing)))

    full = held(lambda layer: layer.crop(0))
    order = torch.tensor([2, 0, 2])
    for got, want in zip(held(lambda layer: layer.crop(-4)), full, strict=True):
        assert torch.equal(got, want[:, :, :2])
    for change in ("reorder_cache", "batch_select_indices"):
        for got, want in zip(
            held(lambda layer, name=change: getattr(layer, name)(order)), full, strict=True
        ):
            assert torch.equal(got, want[order])
    layer = layer_of(name, 2, 16)
    layer.update(keys, values)
    layer.batch_repeat_interleave(2)
    nothing = nothing.repeat(2, 1, 1, 1)
    for got, want in zip(layer.update(nothing, nothing), full, strict=True):
        assert torch.equal(got, want.repeat_interleave(2, dim=0))
    layer.reset()
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative"):
        layer.crop(2)


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
def test_a_window_keeps_what_it_sees(name: str) -> None:
    """Exact as the layer that keeps all, on what is seen, and sinks only while they are."""
    keys, values = vectors(2, 3, 15, 20), vectors(2, 3, 15, 20, seed=1)
    whole = layer_of(name, 3, 20)
    sliding = PackedLayer(
        whole.format, whole.positions and Positions(None, window=4), whole.owner, window=4
    )
    start = 0
    for length in (2, 1, 3, 1, 1, 6, 1):
        part = slice(start, start + length)
        expected = whole.update(keys[:, :, part], values[:, :, part])
        kept, offset = sliding.get_mask_sizes(length)
        found = sliding.update(keys[:, :, part], values[:, :, part])
        start += length
        assert (kept, offset) == (min(start - length, 3) + length, start - kept)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other[:, :, offset:])
        assert sliding.get_seq_length() == start and sliding.keys.shape[2] == min(start, 3)
    with pytest.raises(RuntimeError, match="slid out"):
        sliding.crop(-1)
    sliding.reset()
    sliding.update(keys[:, :, :3], values[:, :, :3])
    sliding.crop(-2)
    assert sliding.get_seq_length() == 1


# In a model


def generated(model: Any, cache: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    out = model.generate(
        ids, **cache_options(model, cache), do_sample=False, max_new_tokens=12, eos_token_id=None,
        **options,
    )  # fmt: skip
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_without_loss_generation_is_that_of_the_dynamic_cache(family: str, beams: int) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 150, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"attention_mask": torch.ones_like(ids), "num_beams": beams}
    expected = generated(model, DynamicCache(config=model.config), ids, **options)
    cache = packed_cache(model, AS_IT_IS)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert len(kinds) == model.config.num_hidden_layers
    assert set(kinds) == {"PackedLayer"}
    assert generated(model, cache, ids, **options) == expected


@pytest.mark.parametrize("name", [*NAMES, "calibrated"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_a_padded_batch_is_two_single_runs(family: str, name: str) -> None:
    model = tiny_model(family)
    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    format = calibrated(heads, width, sinks=2) if name == "calibrated" else parse_format(name)
    long, short = (
        torch.randint(3, 150, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5)
    )
    ids = torch.cat([long, torch.nn.functional.pad(short, (4, 0))])
    mask = (ids != 0).long()
    together = generated(model, packed_cache(model, format), ids, attention_mask=mask)
    for row, one in enumerate((long, short)):
        alone = generated(
            model, packed_cache(model, format), one, attention_mask=torch.ones_like(one)
        )
        assert together[row] == alone[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_one_pass_over_a_text_is_decoding_it(tiny: Any, family: str) -> None:
    model = load(Checkpoint(tiny(family, "float32")), torch.float32, torch.device("cpu"))
    ids = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))
    format = parse_format("rotate:2")

    def make() -> DynamicCache:
        return packed_cache(model, format)

    cache = make()
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], **cache_options(model, cache)).logits for t in range(20)]
        whole = model(ids, **cache_options(model, make())).logits
        exact = model(ids).logits
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)
    assert float((whole - exact).abs().max()) > 0.01
    lossy, free = perplexity(model, ids, cache=make), perplexity(model, ids)
    logs = torch.cat(steps, dim=1).double().log_softmax(-1)
    losses = -logs[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert lossy.token_ppl == pytest.approx(float(losses.exp()), rel=1e-4)
    assert lossy.token_ppl != pytest.approx(free.token_ppl, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_eval_reports_format_and_bits(cli: Any, tiny: Any, text_file: Path, name: str) -> None:
    args = ["eval", tiny(), "--text", text_file, "--seqlen", 40, "--windows", 3, "--device", "cpu"]
    result = cli(*args, "--kv-cache", name, "--against", tiny(), "--json", "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["kv_cache"] == {
        "format": name,
        "bits_per_element": pytest.approx(parse_format(name).bits_per_element(2, 10)),
        "quantised": "every update",
    }
    # The same weights on both sides: what differs is the cache, of CHECKPOINT alone.
    assert document["token_ppl_ratio"] != 1 and document["token_ppl_ratio"] == pytest.approx(
        1, abs=0.2
    )
    plain = json.loads(cli(*args, "--json", "-q").stdout)
    assert plain["token_ppl"] == document["dense_token_ppl"] and "kv_cache" not in plain


def test_eval_refuses_what_it_cannot_pack(cli: Any, tiny: Any) -> None:
    result = cli("eval", tiny(), "--kv-cache", "int4")
    assert result.exit_code == 2 and "rotate:4" in result.stderr
    kinds = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 8}
    with pytest.raises(RecipeError, match="no layer of full or sliding attention"):
        packed_cache(tiny_model(**kinds), AS_IT_IS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_turned_values_give_what_values_turned_back_give(family: str, implementation: str) -> None:
    """Whoever takes the cache's keys and values on the way to attention must not lose the mark."""
    model = tiny_model(family)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has eager attention only")
    model.set_attn_implementation(implementation)
    ids = torch.arange(3, 23).reshape(2, 10)
    found = []
    for plain in (False, True):
        cache = packed_cache(model, parse_format("rotate:4"))
        if plain:
            model.set_attn_implementation(implementation)
        with torch.no_grad():
            first = model(ids[:, :6], **cache_options(model, cache)).logits
            rest = model(ids[:, 6:], **cache_options(model, cache)).logits
        found.append(torch.cat([first, rest], dim=1))
        packed = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        assert all(len(layer._marks) == (0 if plain else 2) for layer in packed)
        assert all(mark.seen for layer in packed for mark in layer._marks)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_lost_mark_is_not_passed_over() -> None:
    layer = PackedLayer(parse_format("rotate:4"), config=tiny_model().config)
    packed_cache(tiny_model(), parse_format("rotate:4"))
    turned.accept(layer.config)
    x = vectors(1, 2, 3, 16)
    layer.update(x, x)
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        layer.update(x, x)


def test_other_attention_gets_values_turned_back() -> None:
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    packed_cache(model, parse_format("rotate:4"))
    assert model.config._attn_implementation == "flex_attention"
