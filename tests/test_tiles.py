"""Decoding over a cache in tiles, against the packed cache that is unpacked at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmsqueeze
from llmsqueeze.errors import EnvironmentFault, RecipeError
from llmsqueeze.evaluate import cache_options
from llmsqueeze.ops import cpu
from llmsqueeze.runtime import kv_cache
from llmsqueeze.runtime.generate import Decoder, fixed_cache
from llmsqueeze.runtime.kv_cache import LayerFormat, packed_cache, parse_format
from llmsqueeze.runtime.tiles import TiledLayer
from tests.conftest import compile_whole, tiny_model
from tests.test_kv_append import codecs

# Heads 64 wide, three of them for six queries' heads.
WIDE = {"hidden_size": 48, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 3}
PROMPT = torch.arange(5, 24)


def wide_model(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, **WIDE, **changes)


def format_of(name: str, sinks: int = 0) -> LayerFormat:
    kind, _, bits = name.partition(":")
    if kind in ("kvquant", "plain"):
        return LayerFormat(*codecs(kind, int(bits), 64, 1), sinks)
    return parse_format(name)


def stepwise(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of every token, read one after another."""
    options = cache_options(model, cache)
    with torch.no_grad():
        found = [model(ids[None, i : i + 1], **options).logits[0, -1] for i in range(len(ids))]
    return torch.stack(found)


NAMES = ["fp8", "rotate:4", "rotate:3", "rotate:2", "kvquant:4", "kvquant:3", "plain:4"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sinks", [0, 3])
def test_tokens_see_what_the_packed_cache_gives_back(family: str, name: str, sinks: int) -> None:
    if sinks and name.partition(":")[0] not in ("kvquant", "plain"):
        pytest.skip("only calibrated formats have sinks")
    model, format = wide_model(family), format_of(name, sinks)
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format)
    with torch.no_grad():
        exact = model(PROMPT[None]).logits[0]
    expected = stepwise(model, packed_cache(model, formats), PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 40, formats=formats)
    found = stepwise(model, decoder.cache, PROMPT)
    assert all(isinstance(layer, TiledLayer) for layer in decoder.cache.layers)
    # A number at the border of two codes may be given either, for which 2 and 3 bits are coarse.
    assert float((found - expected).norm()) < 0.25 * float((expected - exact).norm())


@pytest.mark.parametrize("name", ["rotate:4", "kvquant:3"])
def test_a_prompt_is_read_as_it_is_and_coded_then(name: str) -> None:
    model, format = wide_model(), format_of(name, 2 if name.startswith("kvquant") else 0)
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format)
    with torch.no_grad():
        exact = model(PROMPT[None]).logits[0, -1]
    decoder = Decoder(model, 64, formats=formats)
    for _ in range(2):  # it can be used again
        tokens = [int(token) for token in decoder.generate(PROMPT, 8)]
        assert tokens[0] == int(exact.argmax())
    read = decoder.cache.layers[0].tiles.clone()
    decoder.cache.reset()
    # Coded one by one the first layer's keys and values are the same: they do not depend on attention.
    fed = torch.cat([PROMPT, torch.tensor(tokens[:-1])])
    stepwise(model, decoder.cache, fed)
    assert float((decoder.cache.layers[0].tiles != read).float().mean()) < 1e-3


def test_layers_may_differ() -> None:
    model = wide_model("gemma3_text")
    formats = {3: parse_format("rotate:4")}
    expected = stepwise(model, packed_cache(model, formats), PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 40, formats=formats)
    kinds = [isinstance(layer, TiledLayer) for layer in decoder.cache.layers]
    assert kinds == [False, False, False, True]
    assert torch.allclose(stepwise(model, decoder.cache, PROMPT), expected, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    narrow = tiny_model()
    formats = dict.fromkeys(range(3), parse_format("rotate:4"))
    with pytest.raises(EnvironmentFault, match="heads 10 wide"):
        list(Decoder(narrow, 32, formats=formats).generate(PROMPT, 2))
    moving = tiny_model(
        **WIDE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    calibrated = dict.fromkeys(range(3), format_of("kvquant:4"))
    with pytest.raises(EnvironmentFault, match="length of the text"):
        Decoder(moving, 32, formats=calibrated)
    model = wide_model()
    decoder = Decoder(model, 32, formats=formats)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="did not look"):
        stepwise(model, decoder.cache, PROMPT)
    model.set_attn_implementation("sdpa")
    decoder = Decoder(model, 32, formats=formats)
    options = cache_options(model, decoder.cache)
    with torch.no_grad():
        model(PROMPT[None, :5], **options)
        with pytest.raises(RuntimeError, match="one piece"):
            model(PROMPT[None, 5:9], **options)


def test_generate_takes_it() -> None:
    model, format = wide_model(), format_of("kvquant:4", 2)
    kv_cache.attach(model, dict.fromkeys(range(model.config.num_hidden_layers), format))
    decoder = Decoder(model, 64, formats=model.llmsqueeze_kv_formats)
    expected = [int(token) for token in decoder.generate(PROMPT, 8)]
    formats = kv_cache.attached_formats(model)
    cache = fixed_cache(model, 64, formats)
    options = cache_options(model, cache) | {"do_sample": False, "eos_token_id": None}
    found = model.generate(PROMPT[None], max_new_tokens=8, **options)
    assert found[0, len(PROMPT) :].tolist() == expected
    both = torch.stack([PROMPT, PROMPT.flip(0)])
    options |= cache_options(model, fixed_cache(model, 64, formats))
    assert model.generate(both, max_new_tokens=8, **options)[0, len(PROMPT) :].tolist() == expected
    padded = torch.ones_like(both)
    padded[0, :3] = 0
    options |= cache_options(model, fixed_cache(model, 64, formats))
    with pytest.raises(EnvironmentFault, match="without padding"):
        model.generate(both, attention_mask=padded, max_new_tokens=2, **options)
    options |= cache_options(model, fixed_cache(model, 30, formats))
    with pytest.raises(ValueError, match=r"32 \+ 1 tokens do not fit a cache of 32"):
        model.generate(PROMPT[None], max_new_tokens=20, **options)
    with pytest.raises(RecipeError, match="quantize-kv"):
        llmsqueeze.kv_cache(wide_model(), tokens=64)


def test_a_step_compiles_whole() -> None:
    model = wide_model()
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of("kvquant:4", 2))
    decoder = Decoder(model, 64, formats=formats)
    options = cache_options(model, decoder.cache)
    found = []
    for step in (model, compile_whole(model)):
        decoder.cache.reset()
        with torch.no_grad():
            model(PROMPT[None, :10], **options)
            steps = [step(PROMPT[None, i : i + 1], **options).logits for i in range(10, 19)]
        found.append(torch.cat(steps))
    assert torch.allclose(*found, atol=1e-5)
    # torch.compile may go wrong where an argument lies within another.
    for layer in decoder.cache.layers:
        assert all(sinks.storage_offset() == 0 for sinks in layer.sinks)


def test_a_cache_of_so_many_tokens_needs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model()
    kv_cache.attach(model, dict.fromkeys(range(model.config.num_hidden_layers), format_of("fp8")))
    monkeypatch.setattr(cpu, "library", lambda: object())
    cache = llmsqueeze.kv_cache(model, tokens=64)
    assert all(isinstance(layer, TiledLayer) for layer in cache.layers)
    monkeypatch.setattr(cpu, "library", lambda: None)
    with pytest.raises(EnvironmentFault, match=r"on a CPU where there was a C\+\+ compiler"):
        llmsqueeze.kv_cache(model, tokens=64)


@pytest.mark.parametrize("name", ["fp8", "rotate:4", "kvquant:4"])
def test_the_same_tokens_follow_as_by_the_packed_cache(name: str) -> None:
    """Where one token leads by more than what the logits of both caches differ."""
    model = wide_model()
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of(name))
    ids, count = PROMPT, 12
    for _ in range(count):  # greedy, by the packed cache
        logits = stepwise(model, packed_cache(model, formats), ids)
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    model.set_attn_implementation("sdpa")
    found = stepwise(model, Decoder(model, 64, formats=formats).cache, ids[:-1])
    answers, wanted = (x[len(PROMPT) - 1 :] for x in (found, logits))
    one, two = wanted.topk(2).values.unbind(-1)
    clear = one - two > 2 * (answers - wanted).abs().amax(-1)
    assert int(clear.sum()) > count // 2
    assert torch.equal(answers.argmax(-1)[clear], wanted.argmax(-1)[clear])


def test_attention_factors_are_taken_off_new_keys() -> None:
    """YaRN's: tokens read one by one are coded as those of a prompt."""
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    model = wide_model(rope_parameters=rope)
    assert model.model.rotary_emb.attention_scaling > 1.1
    formats = dict.fromkeys(range(model.config.num_hidden_layers), format_of("kvquant:4"))
    decoder = Decoder(model, 40, formats=formats)
    tiles = []
    for step in (len(PROMPT), 1):
        decoder.cache.reset()
        with torch.no_grad():
            for part in PROMPT.split(step):
                model(part[None], **cache_options(model, decoder.cache))
        tiles.append(decoder.cache.layers[0].tiles.clone())
    assert float((tiles[0] != tiles[1]).float().mean()) < 1e-3
